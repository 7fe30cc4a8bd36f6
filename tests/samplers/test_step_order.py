"""The order of the last steps: lowered for what they cost, or as other programs do."""

import numpy as np
import pytest
import torch

from samplers import Sampler, integrate
from samplers.deis import DEIS
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.timesteps import LogSNR
from samplers.unipc import UniPC
from tests.samplers.cases import DISCRETE, FLOW, VP, label

MULTISTEP: list[Sampler] = [
    DPMSolverPP(),
    DPMSolverPP(order=3),
    DEIS(),
    DEIS(order=3),
    UniPC(),
    UniPC(order=3),
]
each = pytest.mark.parametrize("sampler", MULTISTEP, ids=label)


def errors(sampler: Sampler, spacing: str, steps: range) -> list[float]:
    """Root mean square distance from where the exact flow lands, on the mixture."""
    data = GaussianMixtureDenoiser(DISCRETE)
    x = torch.linspace(-1.6, 1.6, 17, dtype=torch.float64)[None]
    exact = data.transport(x, 999.0, 0.0)
    found: list[float] = []
    for count in steps:
        plan = sampler.plan(DISCRETE.grid(spacing, count))
        found.append(float((integrate(plan, data, x) - exact).square().mean().sqrt()))
    return found


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@each
def test_more_steps_are_never_much_worse(sampler: Sampler, spacing: str) -> None:
    """With a count of steps below which the order is lowered, 15 steps were 2.6 times worse."""
    found = np.array(errors(sampler, spacing, range(5, 41)))
    assert (found[1:] / np.minimum.accumulate(found)[:-1]).max() < 1.25, found


@each
def test_lowering_pays_where_the_last_step_is_long_and_is_not_made_elsewhere(
    sampler: Sampler,
) -> None:
    kept = sampler.model_copy(update={"lower_order_final": False})
    lowered, full = (errors(one, "linspace", range(20, 21)) for one in (sampler, kept))
    # With order 2, DEIS reaches not far enough to be lowered.
    assert lowered[0] < 0.5 * full[0] or (lowered == full and sampler == DEIS())
    even = VP.grid(LogSNR(), 20)
    np.testing.assert_array_equal(sampler.plan(even).tables, kept.plan(even).tables)


def differing(one: Sampler, other: Sampler, steps: int) -> list[int]:
    grid = FLOW.grid("linspace", steps)
    tables, others = one.plan(grid).tables, other.plan(grid).tables
    return np.any(tables != others, axis=(1, 2)).nonzero()[0].tolist()


@pytest.mark.parametrize("kind", [DPMSolverPP, DEIS])
def test_below_15_steps_is_what_it_says(kind: type[DPMSolverPP] | type[DEIS]) -> None:
    kept = kind(order=3, lower_order_final=False)
    lowered = kind(order=3, lower_order_final="below_15_steps")
    # The last step to the clean picture is of first order in any case.
    assert differing(lowered, kept, 14) == [12]
    assert differing(lowered, kept, 15) == []


def test_always_is_what_it_says() -> None:
    kept, lowered = (UniPC(order=3, lower_order_final=one) for one in (False, "always"))
    assert differing(lowered, kept, 30) == [28]
