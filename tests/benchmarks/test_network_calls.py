"""The cost of a network's call, and a group norm by another order of reductions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.network_calls import call_costs, wide_group_norm


@pytest.mark.parametrize("affine", [True, False])
def test_the_wide_group_norm_is_that_of_torch_but_for_rounding(*, affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(2, 12, 5, 7, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 12, generator=generator, dtype=torch.float64).unbind()
    given = (x, 4, weight if affine else None, bias if affine else None, 1e-6)
    ours = wide_group_norm(*given)
    assert torch.allclose(ours, F.group_norm(*given), atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_operations_that_take_longest_are_named_first() -> None:
    x = torch.ones(512, 512)
    found = call_costs(lambda: (x @ x).add_(1))
    assert found.longest[0][0] == "aten::mm"
    assert 0 < found.longest[0][1] < 10 * found.done_s
    assert found.launch_s <= found.done_s
