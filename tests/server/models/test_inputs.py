"""Inputs of rows can be selected, replaced and padded without knowing what they are."""

from __future__ import annotations

import torch

from guidance.edits import ApartFrom, IdentityAttention
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.conditioning import Conditioning, StackedConditioning
from server.models.controls.row_controls import RowControls
from server.models.inputs import RowInputs
from tests.server.toy_model import Toy

ADAPTED = Weighted(Adapter("pastel", "", {}), 0.5)


def stacked(rows: int) -> StackedConditioning:
    hidden, pooled = torch.arange(6.0 * rows).view(rows, 2, 3), torch.arange(float(rows))[:, None]
    return StackedConditioning({"hidden": hidden, "pooled": pooled})


def apart(reference: int) -> ApartFrom:
    return ApartFrom(("middle",), 1.0, 0.5, reference)


def test_conditioning_counts_the_bytes_of_all_that_it_holds() -> None:
    one = Conditioning({"hidden": torch.zeros(77, 8), "pooled": torch.zeros(4).half()}, 77)
    assert one.nbytes == 77 * 8 * 4 + 4 * 2


def test_rows_are_stacked_in_their_order() -> None:
    rows = [Conditioning({"hidden": torch.full((2, 3), float(k))}, 2) for k in range(3)]
    together = Toy().stack(rows).tensors["hidden"]
    assert together.shape == (3, 2, 3)
    assert together[:, 0, 0].tolist() == [0, 1, 2]


def test_replacing_rows_replaces_all_that_belongs_to_them() -> None:
    before = stacked(3)
    after = before.put(torch.tensor([2]), stacked(1))
    assert after.tensors["pooled"].flatten().tolist() == [0, 1, 0]
    torch.testing.assert_close(after.tensors["hidden"][2], before.tensors["hidden"][0])
    assert before.tensors["pooled"].flatten().tolist() == [0, 1, 2]


def test_some_rows_keep_all_that_is_theirs_and_their_references() -> None:
    inputs = RowInputs(
        stacked(4),
        [(), (IdentityAttention(("middle",)),), (apart(3),), ()],
        torch.arange(4.0),
        torch.arange(4.0).view(4, 1, 1, 1),
        adapters=RowAdapters(((), (ADAPTED,), (ADAPTED, ADAPTED), ())),
    )
    some = inputs.of([3, 2])
    assert some.conditioning.tensors["pooled"].flatten().tolist() == [3, 2]
    assert some.edits == [(), (apart(0),)]
    assert some.scale_embedding is not None
    assert some.scale_embedding.tolist() == [3, 2]
    assert some.channels is not None
    assert some.channels.flatten().tolist() == [3, 2]
    assert some.adapters == RowAdapters(((), (ADAPTED, ADAPTED)))


def test_rows_that_nothing_acts_on_are_plain() -> None:
    inputs = RowInputs(
        stacked(2),
        adapters=RowAdapters(((ADAPTED,), ())),
        controls=RowControls(((), ()), (0, 1)),
    )
    some = inputs.of([1])
    assert (some.adapters, some.controls, some.plain) == (None, None, True)


def test_padding_repeats_the_first_row_and_leaves_references_where_they_were() -> None:
    inputs = RowInputs(stacked(2), [(), (apart(0),)], torch.tensor([5.0, 6.0]))
    padded = inputs.padded(4)
    assert padded.conditioning.tensors["pooled"].flatten().tolist() == [0, 1, 0, 0]
    assert padded.edits == [(), (apart(0),), (), ()]
    assert padded.scale_embedding is not None
    assert padded.scale_embedding.tolist() == [5, 6, 5, 5]
    assert inputs.padded(None) is inputs


def test_padding_has_no_adapters_and_fixes_those_of_the_others() -> None:
    inputs = RowInputs(stacked(2), adapters=RowAdapters(((ADAPTED,), ())))
    assert inputs.padded(None).adapters == RowAdapters(((ADAPTED,), ()))
    assert inputs.padded(2).adapters == RowAdapters(((ADAPTED,), ()), fixed=True)
    assert inputs.padded(4).adapters == RowAdapters(((ADAPTED,), (), (), ()), fixed=True)
