"""The covering selection of cells contains all values, and is the same each time."""

from collections import Counter
from itertools import product

import pytest

from tests.covering import EVERY_CELL, covering, few_of, spread

AXES = (range(5), "abc", (True, False))


def test_each_value_is_met_in_as_few_cells_as_the_longest_axis_has() -> None:
    chosen = covering(product(*AXES), tuple, every_cell=False)
    assert len(chosen) == 5
    for k, axis in enumerate(AXES):
        assert {cell[k] for cell in chosen} == set(axis)


def test_values_of_a_short_axis_are_met_about_as_often() -> None:
    chosen = covering(product(range(30), "abc"), tuple, every_cell=False)
    assert Counter(letter for _, letter in chosen) == {"a": 10, "b": 10, "c": 10}


def test_each_pair_that_some_cell_has_is_met() -> None:
    cells = [cell for cell in product(*AXES) if cell[0] != 4 or cell[1] == "a"]
    chosen = covering(cells, tuple, together=2, every_cell=False)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(c[i], c[j]) for c in chosen} == {(c[i], c[j]) for c in cells}
    assert len(chosen) < 0.7 * len(cells)


def test_cells_of_one_axis_are_all_met() -> None:
    assert covering("abc", tuple, together=2, every_cell=False) == ["a", "b", "c"]


def test_the_choice_keeps_the_order_and_depends_on_nothing_else() -> None:
    first, again = (covering(product(*AXES), tuple, every_cell=False) for _ in range(2))
    assert first == again == sorted(first, key=list(product(*AXES)).index)


@pytest.mark.parametrize("together", [1, 2])
def test_a_run_of_everything_takes_every_cell(together: int) -> None:
    assert covering(product(*AXES), tuple, together, every_cell=True) == list(product(*AXES))


def test_values_that_are_not_hashable_are_spread_too() -> None:
    chosen = spread([[], {}], "abc")
    assert all(any(found == one for found, _ in chosen) for one in ([], {}))
    assert {letter for _, letter in chosen} == set("abc")
    assert len(chosen) == (6 if EVERY_CELL else 3)


def test_few_of_some_values_are_some_of_them() -> None:
    assert few_of("abc", "ca") == (list("abc") if EVERY_CELL else list("ca"))
    with pytest.raises(ValueError, match=r"\['d'\] are none of"):
        few_of("abc", "ad")
