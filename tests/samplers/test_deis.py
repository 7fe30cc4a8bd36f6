"""DEIS, beyond the contract of all samplers."""

import numpy as np
import pytest

from samplers import Grid
from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.timesteps import LogSNR, Trailing
from tests.covering import spread
from tests.samplers.cases import EDM, FLOW, VP


@pytest.mark.parametrize(
    ("reach", "order"), [*spread([0.02, 0.6, 3.0], [1, 2]), (0.02, 3), (0.6, 3), (3.0, 3)]
)
def test_eps_that_is_a_polynomial_in_log_sigma_is_integrated_exactly(
    order: int, reach: float
) -> None:
    """Where alpha is 1: x' - x is the integral of eps over sigma, here by Gauss quadrature."""
    sigma = 5.0 * np.exp(-reach * np.array([0, 0.8, 2.1, 3.0]))
    grid = Grid.on_times(EDM, sigma, clean=False)
    plan = DEIS.model_validate({"order": order, "lower_order_final": False}).plan(grid)
    points, shares = np.polynomial.legendre.leggauss(60)
    for power in range(order):
        state, before = np.zeros(plan.slots), 0.0
        for i in range(3):
            before = float(state[0])
            denoised = state[0] - sigma[i] * np.log(sigma[i]) ** power
            state = plan.tables[i] @ np.array([*state, denoised, 0, 1])
        at = sigma[2] + (points + 1) / 2 * (sigma[3] - sigma[2])
        exact = shares @ np.log(at) ** power * (sigma[3] - sigma[2]) / 2
        assert state[0] - before == pytest.approx(exact, rel=1e-8)


def test_order_one_is_ddim() -> None:
    grid = FLOW.grid(Trailing(), 6)
    np.testing.assert_allclose(
        DEIS(order=1).plan(grid).tables, DDIM().plan(grid).tables, rtol=0, atol=1e-14
    )


def test_slots_are_no_more_than_the_order_needs() -> None:
    grid = VP.grid(LogSNR(), 6)
    assert [DEIS.model_validate({"order": o}).plan(grid).slots for o in (1, 2, 3)] == [1, 2, 3]
