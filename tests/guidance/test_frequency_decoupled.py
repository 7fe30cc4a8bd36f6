"""Frequency-decoupled guidance: the pyramid decomposes a picture and reconstructs it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance.cfg import CFG
from guidance.frequency_decoupled import FrequencyDecoupled, low_frequencies
from tests.covering import few_of
from tests.guidance.cases import apply, draw, with_other


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


def kornia_blur(x: Tensor) -> Tensor:
    """kornia's filter: 5 x 5 binomial, borders mirrored."""
    line = torch.tensor([1.0, 4, 6, 4, 1], dtype=x.dtype) / 16
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def kornia_level(x: Tensor) -> Tensor:
    """The pyrup of the second level of ``build_laplacian_pyramid`` in kornia 0.9, cropped.

    The picture is blurred and halved (pyrdown), then doubled and blurred (pyrup), both bilinear.
    Sides are padded by mirroring to the next power of two where neither is one, or where one cannot
    be halved.
    """
    height, width = x.shape[-2:]
    powers = [2 ** math.ceil(math.log2(side)) for side in (height, width)]
    if (powers[0] != height and powers[1] != width) or height % 2 or width % 2:
        x = F.pad(x, (0, powers[1] - width, 0, powers[0] - height), mode="reflect")
    size = (x.shape[-2], x.shape[-1])
    half = (size[0] // 2, size[1] // 2)
    down = F.interpolate(kornia_blur(x), size=half, mode="bilinear", align_corners=False)
    up = kornia_blur(F.interpolate(down, size=size, mode="bilinear", align_corners=False))
    return up[..., :height, :width]


SIZES = [
    (16, 16),
    (16, 5),
    (64, 32),
    (8, 12),
    (24, 40),
    (96, 120),
    (24, 33),
    (5, 16),
    (3, 65),
    (127, 129),
]


@pytest.mark.parametrize(
    "size", few_of(SIZES, [(16, 16), (16, 5), (8, 12), (24, 40), (24, 33), (5, 16), (3, 65)])
)
def test_the_level_is_kornias(size: tuple[int, int]) -> None:
    x = picture(*size)
    torch.testing.assert_close(low_frequencies(x), kornia_level(x), rtol=1e-12, atol=1e-12)


@given(height=st.integers(1, 33), width=st.integers(1, 33))
def test_any_size_is_given_back_and_a_flat_picture_is_all_low(height: int, width: int) -> None:
    x = picture(height, width)
    low = low_frequencies(x)
    assert low.shape == x.shape
    torch.testing.assert_close(low + (x - low), x)
    flat = torch.full_like(x, 2.5)
    torch.testing.assert_close(low_frequencies(flat), flat)


def test_a_checkerboard_is_all_detail() -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    assert float(low_frequencies(board[None, None].double()).abs().max()) < 1e-12


@given(seed=st.integers(0, 50), high=st.floats(0, 50), low=st.floats(0, 50))
def test_each_level_is_cfg_with_its_own_scale(seed: int, high: float, low: float) -> None:
    """In the published order: both predictions are decomposed, guided and recombined."""
    rows = draw(3, seed)
    coarse = [low_frequencies(D) for D in (rows.cond, rows.other)]
    detail = [D - c for D, c in zip((rows.cond, rows.other), coarse, strict=True)]
    guided = [c_u + w * (c_c - c_u) for w, (c_c, c_u) in ((high, detail), (low, coarse))]
    result = apply(FrequencyDecoupled(scale=low, scale_high=high), rows).denoised
    torch.testing.assert_close(result, guided[0] + guided[1])


@given(scale=st.floats(0, 100), seed=st.integers(0, 50))
def test_equal_scales_are_cfg(scale: float, seed: int) -> None:
    rows = draw(2, seed)
    torch.testing.assert_close(
        apply(FrequencyDecoupled(scale=scale, scale_high=scale), rows).denoised,
        apply(CFG(scale=scale), rows).denoised,
    )


def test_a_difference_of_layout_alone_is_not_guided_by_the_scale_of_detail() -> None:
    rows = draw(2)
    rows = with_other(rows, rows.cond - 0.7)
    calm, loud = (apply(FrequencyDecoupled(scale=2, scale_high=h), rows).denoised for h in (1, 50))
    torch.testing.assert_close(calm, loud)
