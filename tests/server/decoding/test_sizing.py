"""Uploads get the requested size, or one that the model can draw, without distortion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from server.decoding.sizing import PictureTarget, ResizeMode, resize_to

LIMIT = 2**20
SIDES = st.integers(1, 5000)


def halves(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Black on the left, white on the right."""
    image = Image.new(mode, (width, height))
    image.paste(Image.new(mode, (width, height), "white"), (width // 2, 0))
    return image


def row(image: Image.Image) -> list[int]:
    return np.asarray(image.convert("L"))[image.height // 2].tolist()


@pytest.mark.parametrize(
    ("mode", "black"),
    # Of 128 columns: a half; a half of the middle; a half, of which 32 are the repeated edge.
    [("stretch", 64), ("crop", 64), ("fill", 64)],
)
def test_other_proportions_are_stretched_cropped_or_filled(mode: ResizeMode, black: int) -> None:
    tall = halves(64, 128)
    brought = resize_to(tall, PictureTarget(128, 128, mode), LIMIT)
    assert brought.size == (128, 128)
    assert sum(value < 128 for value in row(brought)) == black
    wide = resize_to(halves(256, 64, "L"), PictureTarget(64, 64, mode), LIMIT)
    assert (wide.size, wide.mode) == ((64, 64), "L")
    assert sum(value < 128 for value in row(wide)) == 32


def test_what_is_cropped_lies_outside_and_what_is_filled_is_the_edge() -> None:
    """A mark at the left edge is thinner when stretched, gone when cropped, kept when filled."""
    image = Image.new("L", (256, 64))
    image.paste(255, (0, 0, 16, 64))
    bright = {
        mode: sum(
            value > 128 for value in row(resize_to(image, PictureTarget(64, 64, mode), LIMIT))
        )
        for mode in ("stretch", "crop", "fill")
    }
    assert bright == {"stretch": 4, "crop": 0, "fill": 4}
    image = Image.new("L", (64, 256))
    image.paste(255, (0, 0, 16, 256))
    filled = row(resize_to(image, PictureTarget(64, 64, "fill"), LIMIT))
    # The picture is 16 wide, and its left edge is repeated over 24 columns more.
    assert sum(value > 128 for value in filled) == 24 + 4


@pytest.mark.parametrize("size", [(57, 40), (16, 90), (7, 5)])
def test_the_middle_is_what_the_image_processor_of_clip_shows(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    middle = np.asarray(resize_to(image, PictureTarget(24, 24, "middle"), 1))
    processor: Any = CLIPImageProcessorPil(size=24, crop_size=24, do_normalize=False)
    [shown] = processor(image, return_tensors="np").pixel_values
    assert np.array_equal(middle, (255 * shown).round().astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (PictureTarget(), (640, 361)),
        (PictureTarget(multiple=32), (640, 352)),
        (PictureTarget(width=320, multiple=32), (320, 192)),
        (PictureTarget(height=720, multiple=8), (1280, 720)),
        (PictureTarget(width=100, height=50, multiple=32), (100, 50)),
        (PictureTarget(multiple=16, longest=256), (256, 144)),
    ],
    ids=str,
)
def test_sides_that_are_not_given_follow_from_the_picture(
    target: PictureTarget, size: tuple[int, int]
) -> None:
    assert target.size_of(640, 361, LIMIT) == size


@given(
    SIDES,
    SIDES,
    st.sampled_from([1, 8, 32]),
    st.none() | st.integers(64, 2048),
    st.integers(64 * 64, LIMIT),
)
def test_a_picture_of_any_size_is_brought_within_the_limits(
    width: int, height: int, multiple: int, longest: int | None, limit: int
) -> None:
    found = PictureTarget(multiple=multiple, longest=longest).size_of(width, height, limit)
    assert all(side > 0 and side % multiple == 0 for side in found)
    assert found[0] * found[1] <= limit
    assert longest is None or max(found) <= longest
