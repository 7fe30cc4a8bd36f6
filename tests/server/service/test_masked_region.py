"""The region around a mask: its place, and that nothing outside it changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.service.masked_region import Box, Region, around


def mask_of(box: Box, width: int = 100, height: int = 80) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[box.where] = 255
    return mask


@pytest.mark.parametrize(
    ("painted", "padding", "size", "expected"),
    [
        (Box(40, 30, 60, 50), 0, (64, 64), Box(40, 30, 60, 50)),
        (Box(40, 30, 60, 50), 5, (64, 64), Box(35, 25, 65, 55)),
        (Box(40, 30, 60, 50), 0, (128, 64), Box(30, 30, 70, 50)),
        (Box(0, 30, 20, 50), 0, (128, 64), Box(0, 30, 40, 50)),
        (Box(0, 0, 100, 80), 9, (64, 64), Box(0, 0, 100, 80)),
    ],
)
def test_a_region_has_the_proportions_of_the_drawing(
    painted: Box, padding: int, size: tuple[int, int], expected: Box
) -> None:
    assert around(mask_of(painted), padding, *size) == expected


@given(
    st.tuples(st.integers(0, 99), st.integers(0, 79)),
    st.tuples(st.integers(1, 100), st.integers(1, 80)),
    st.integers(0, 50),
    st.tuples(st.integers(8, 512), st.integers(8, 512)),
)
def test_a_region_holds_its_mask_and_lies_in_the_picture(
    corner: tuple[int, int], extent: tuple[int, int], padding: int, size: tuple[int, int]
) -> None:
    right, bottom = min(100, corner[0] + extent[0]), min(80, corner[1] + extent[1])
    painted = Box(corner[0], corner[1], right, bottom)
    box = around(mask_of(painted), padding, *size)
    assert 0 <= box.left <= painted.left < painted.right <= box.right <= 100
    assert 0 <= box.top <= painted.top < painted.bottom <= box.bottom <= 80


def test_what_is_put_back_changes_what_the_mask_says_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    mask = mask_of(Box(40, 30, 60, 50))
    mask[30, 40] = 51
    region = Region(picture, mask, around(mask, 4, 64, 64))
    whole = region.put_back(np.full((64, 64, 3), 200, np.uint8))
    assert (whole[mask == 0] == picture[mask == 0]).all()
    assert (whole[mask == 255] == 200).all()
    mixed = picture[30, 40] + 0.2 * (200 - picture[30, 40].astype(float))
    assert np.abs(whole[30, 40] - mixed).max() <= 0.5
