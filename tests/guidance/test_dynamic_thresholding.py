"""Dynamic thresholding compared with numpy's quantiles and the paper's three lines."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidance.cfg import CFG
from guidance.dynamic_thresholding import DynamicThresholding, quantile
from tests.guidance.cases import apply, draw


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
def test_it_is_the_papers_three_lines(limit: float) -> None:
    rows = draw(4)
    result = apply(DynamicThresholding(scale=8, limit=limit), rows).denoised
    for i in range(4):
        cond, other = rows.cond[i].numpy(), rows.other[i].numpy()
        x0 = other + 8 * (cond - other)
        s = max(np.quantile(np.abs(x0), 0.995), limit)
        np.testing.assert_allclose(result[i].numpy(), np.clip(x0, -s, s) / s * limit, rtol=1e-12)


@given(share=st.floats(0, 1), seed=st.integers(0, 100), columns=st.integers(1, 40))
def test_quantiles_are_numpys(share: float, seed: int, columns: int) -> None:
    values = torch.randn(3, 1, 1, columns, generator=torch.Generator().manual_seed(seed)).double()
    found = quantile(values, torch.full((3, 1, 1, 1), share, dtype=torch.float64))
    expected = np.quantile(values.numpy().reshape(3, -1), share, axis=1)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_each_row_has_a_quantile_of_its_own() -> None:
    values = torch.arange(5.0).view(1, 1, 1, 5).repeat(3, 1, 1, 1)
    shares = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    assert quantile(values, shares).flatten().tolist() == [0, 2, 4]


@given(seed=st.integers(0, 100), limit=st.floats(0.125, 5), scale=st.floats(1.5, 50))
def test_nothing_reaches_beyond_the_limit(seed: int, limit: float, scale: float) -> None:
    result = apply(DynamicThresholding(scale=scale, limit=limit), draw(2, seed)).denoised
    assert float(result.abs().max()) <= limit * (1 + 1e-12)


def test_within_the_limit_it_is_cfg() -> None:
    rows = draw(3)
    free = apply(DynamicThresholding(scale=6, limit=1000), rows).denoised
    torch.testing.assert_close(free, apply(CFG(scale=6), rows).denoised)


def test_scale_one_is_the_prompt() -> None:
    rows = draw(2)
    assert torch.equal(apply(DynamicThresholding(scale=1, limit=0.125), rows).denoised, rows.cond)
