"""Tangential damping compared with a singular value decomposition, and at pure noise."""

from dataclasses import replace

import pytest
import torch
from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance import Rows
from guidance.cfg import CFG
from guidance.tcfg import TCFG
from tests.guidance.cases import apply, draw, with_other


def published(rows: Rows, scale: float) -> Tensor:
    """Listing 1, in float64: the unconditional noise projected on the first singular vector."""
    cond, other = ((rows.x - rows.alpha * D) / rows.sigma for D in (rows.cond, rows.other))
    _, _, V = torch.linalg.svd(torch.stack([cond, other], 1).flatten(2), full_matrices=False)
    first = V[:, 0].view_as(cond)
    projected = (other * first).flatten(1).sum(1).view(-1, 1, 1, 1) * first
    return (rows.x - rows.sigma * (projected + scale * (cond - projected))) / rows.alpha


@given(scale=st.floats(0, 30), seed=st.integers(0, 300))
def test_the_closed_form_is_the_decomposition(scale: float, seed: int) -> None:
    rows = draw(4, seed)
    torch.testing.assert_close(
        apply(TCFG(scale=scale), rows).denoised, published(rows, scale), rtol=1e-7, atol=1e-7
    )


@given(seed=st.integers(0, 300), spread=st.floats(0.1, 30))
def test_also_where_the_noises_disagree(seed: int, spread: float) -> None:
    rows = draw(3, seed)
    rows = with_other(rows, rows.cond + spread * draw(3, seed + 1000).cond)
    torch.testing.assert_close(
        apply(TCFG(scale=3), rows).denoised, published(rows, 3), rtol=1e-5, atol=1e-5
    )


def test_in_noise_space_it_is_diffusers() -> None:
    rows = draw(4)
    cond, other = ((rows.x - rows.alpha * D) / rows.sigma for D in (rows.cond, rows.other))
    theirs = (rows.x - rows.sigma * normalized_guidance(cond, other, 7.5)) / rows.alpha
    torch.testing.assert_close(apply(TCFG(scale=7.5), rows).denoised, theirs, rtol=1e-3, atol=1e-3)


def test_undamped_it_is_cfg() -> None:
    rows = draw(3)
    plain = apply(TCFG(scale=5, damping=0), rows).denoised
    torch.testing.assert_close(plain, apply(CFG(scale=5), rows).denoised)


def test_at_pure_noise_it_has_the_limit() -> None:
    """Half of the component orthogonal to the noise, and all of the parallel one."""
    rows = draw(3)
    pure = replace(rows, alpha=torch.zeros_like(rows.alpha), sigma=torch.ones_like(rows.alpha))
    d = rows.cond - rows.other
    share = (d * rows.x).flatten(1).sum(1) / rows.x.square().flatten(1).sum(1)
    along = share.view(-1, 1, 1, 1) * rows.x
    expected = rows.cond + 4 * (along + (d - along) / 2)
    torch.testing.assert_close(apply(TCFG(scale=5), pure).denoised, expected)
    nearly = replace(pure, alpha=torch.full_like(rows.alpha, 1e-6))
    torch.testing.assert_close(
        apply(TCFG(scale=5), nearly).denoised, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_noises_without_a_first_direction_are_cfg(factor: float) -> None:
    """Both zero, or of equal length and opposite: no direction is singled out."""
    rows = draw(2)
    half = torch.full_like(rows.alpha, 0.5)
    noise = factor * rows.x
    cond, other = (rows.x - noise) / 0.5, (rows.x + noise) / 0.5
    rows = with_other(replace(rows, cond=cond, alpha=half), other)
    torch.testing.assert_close(
        apply(TCFG(scale=3), rows).denoised, apply(CFG(scale=3), rows).denoised
    )


def test_reductions_keep_their_digits_in_float32() -> None:
    rows = draw(3)
    fields = {name: getattr(rows, name) for name in Rows.__slots__}
    half = Rows(**{k: v.float() if v.is_floating_point() else v for k, v in fields.items()})
    exact, single = (apply(TCFG(), one).denoised for one in (rows, half))
    assert single.dtype == torch.float32
    assert float((single - exact).norm() / exact.norm()) < 1e-6
