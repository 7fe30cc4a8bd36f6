"""How many rows forwards have when the first forward of each number is slow."""

from __future__ import annotations

import pytest

from server.engine.row_sizes import FIRST_FORWARD_OVERHEAD_S, ROW_SIZES, RowSizes


def gpu(rows: int) -> float:
    """Like an H100 with Stable Diffusion 1.5: up to 12 rows, launches limit it."""
    return max(0.034, 0.0035 * rows)


def size_of(sizes: RowSizes, rows: int, max_rows: int = 128) -> int:
    return sizes.of(rows, max_rows, gpu)


def known(*ran: int, max_rows: int = 128) -> RowSizes:
    sizes = RowSizes(max_rows)
    for size in ran:
        sizes.note(size, size, gpu)
    return sizes


def test_filling_up_costs_a_quarter_at_most_where_a_row_costs_anything():
    sizes = known(*ROW_SIZES)
    for rows in range(1, 129):
        assert rows <= size_of(sizes, rows) <= max(12, 1.25 * rows)


def test_a_size_that_is_known_is_preferred_to_the_first_forward_of_another():
    assert size_of(known(1, 4), 2) == 4
    assert size_of(known(1, 4, 64), 5) == 64


def test_nothing_known_is_run_at_the_next_usual_size():
    assert size_of(known(), 5) == 6
    assert size_of(known(1, 4), 17) == 20


def test_what_fills_up_for_long_enough_pays_for_a_first_forward():
    """20 rows run as 96 take .27 s longer each time; a first forward at 20 takes .5 s, once."""
    sizes = known(96)
    chosen: list[int] = []
    for _ in range(4):
        chosen.append(size_of(sizes, 20))
        sizes.note(20, chosen[-1], gpu)
    assert chosen == [96, 20, 20, 20]


def test_a_number_of_rows_that_is_filled_up_again_and_again_becomes_a_size_of_its_own():
    sizes = known(*ROW_SIZES)
    assert not sizes.wanted
    each_s = gpu(40) - gpu(33)
    for _ in range(int(FIRST_FORWARD_OVERHEAD_S / each_s) + 1):
        assert size_of(sizes, 33) == 40
        sizes.note(33, 40, gpu)
    assert sizes.wanted == [33]
    # Not in a tick for which somebody waits.
    assert size_of(sizes, 33) == 40
    sizes.note(33, 33, gpu)
    assert size_of(sizes, 33) == 33


def test_where_rows_cost_nothing_none_becomes_a_size_of_its_own():
    sizes = known(*ROW_SIZES)
    for _ in range(10_000):
        sizes.note(5, 6, gpu)
    assert not sizes.wanted


@pytest.mark.parametrize(("rows", "max_rows", "expected"), [(9, 9, 9), (30, 31, 30), (3, 3, 3)])
def test_nothing_is_filled_up_beyond_what_fits_into_memory(rows, max_rows, expected):
    assert size_of(known(*ROW_SIZES), rows, max_rows) == expected
    assert size_of(known(max_rows=max_rows), max_rows, max_rows) == max_rows


def test_an_image_that_needs_more_rows_than_fit_is_tried_as_it_is():
    assert size_of(known(16), 12, max_rows=6) == 12


def test_sizes_for_which_there_is_no_memory_are_not_wanted():
    sizes = known(1, 2, 3)
    sizes.leave_out(10)
    assert sizes.wanted == [4, 6, 8]
