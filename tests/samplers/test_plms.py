"""PLMS, beyond the contract of all samplers."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import integrate
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.plms import PLMS
from samplers.timesteps import Trailing
from tests.samplers.cases import FLOW, VP

WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_runs_are_those_of_the_papers_loop(steps: int) -> None:
    data = GaussianMixtureDenoiser(VP)
    grid = VP.grid(Trailing(), steps)
    points = list(zip(grid.t.tolist(), grid.alpha.tolist(), grid.sigma.tolist(), strict=True))

    def eps(x: Tensor, point: tuple[float, float, float]) -> Tensor:
        t, a, s = point
        return (x - a * data(x, t)) / s

    start = x = torch.linspace(-1.6, 1.6, 7, dtype=torch.float64)[None]
    past: list[Tensor] = []
    for here, there in pairwise(points):
        past.insert(0, eps(x, here))
        (_, a, s), (_, a2, s2) = here, there
        reach = s2 / a2 - s / a
        along: Any = past[0]
        if len(past) == 1 and steps > 1:
            along = (past[0] + eps(a2 * (x / a + reach * past[0]), there)) / 2
        elif len(past) > 1:
            weights = WEIGHTS[min(len(past), 4)]
            along = sum(w * e for w, e in zip(weights, past, strict=False))
        x = a2 * (x / a + reach * along)
    torch.testing.assert_close(integrate(PLMS().plan(grid), data, start), x, rtol=1e-10, atol=1e-11)


def test_the_first_step_takes_two_evaluations_and_ends_where_the_second_is_made() -> None:
    plan = PLMS().plan(FLOW.grid(Trailing(), 4))
    assert plan.step == (0, 0, 1, 2, 3)
    assert plan.t[1] == plan.t[2]
    assert plan.evaluations == PLMS().evaluations(4) == 5
    assert PLMS().evaluations(1) == 1
