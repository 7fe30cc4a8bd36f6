"""Which calls of a block can use the same program."""

import torch
from torch import Tensor

from server.models.compiling.block_call import BlockCall, fits, layout_of, read


def call(rows: int, tokens: int = 6, **kwargs: object) -> BlockCall:
    made = read((torch.zeros(rows, tokens, 4),), {"rope": torch.zeros(tokens, 2), **kwargs})
    assert made is not None
    return made


def given(rows: int, mask: Tensor | None = None) -> list[Tensor]:
    return [torch.zeros(rows, 6, 4), torch.zeros(6, 2) if mask is None else mask]


def test_calls_that_differ_in_rows_and_values_alone_are_alike() -> None:
    assert call(2, mask=None).key == call(5, mask=None).key
    others = call(2, tokens=8), call(2, mask=True), call(2, mask=1), call(2)
    assert len({one.key for one in (call(2, mask=None), *others)}) == 5
    lying = read((torch.zeros(2, 4, 6).mT,), {"rope": torch.zeros(6, 2)})
    assert lying is not None
    assert lying.key != call(2).key


def test_a_call_of_something_unknown_is_none() -> None:
    assert read((torch.zeros(2, 3), object()), {}) is None
    assert read((torch.tensor(1.0),), {}) is None
    assert read((), {"height": 3}) is None


def test_a_call_says_what_has_an_entry_a_row_unless_sizes_coincide() -> None:
    layout = layout_of(call(5))
    assert layout == ((0, 6), (1, 0), (24, 2))
    assert layout_of(call(1)) is None
    assert layout_of(call(4)) is None
    assert layout is not None
    assert [fits(layout, given(rows), 8) for rows in (1, 3, 8, 9)] == [True, True, True, False]
    assert not fits(layout, given(3, torch.zeros(3, 2)), 8)
    # One tensor expanded to all rows has another layout than one for each row.
    assert not fits(layout, [torch.zeros(1, 6, 4).expand(3, -1, -1), torch.zeros(6, 2)], 8)


def test_a_tensor_may_have_two_entries_a_row() -> None:
    def told(rows: int) -> BlockCall:
        return call(rows, times=torch.zeros(2 * rows, 5))

    # Two rows have four entries, as many as another dimension.
    assert layout_of(told(2)) is None
    layout = layout_of(told(7))
    assert layout == ((0, 6, 0), (1, 0, 2), (24, 2, 5))
    assert layout is not None
    assert [fits(layout, told(rows).tensors, 8) for rows in (1, 2, 7)] == [True, True, True]
    assert not fits(layout, call(3, times=torch.zeros(3, 5)).tensors, 8)
