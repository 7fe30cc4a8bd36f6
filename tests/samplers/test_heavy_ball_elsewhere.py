"""Heavy ball momentum in DPM-Solver++ and UniPC."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import integrate
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heavy_ball import HB
from samplers.timesteps import LogSNR
from samplers.unipc import UniPC, _weights
from tests.samplers.cases import EDM, VP

BETA = 0.8
START = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
DATA = GaussianMixtureDenoiser(VP)
GRID = VP.grid(LogSNR(), 6, t_end=0.05)
LAM, ALPHA, SIGMA, H = GRID.half_log_snr, GRID.alpha, GRID.sigma, np.diff(GRID.half_log_snr)


def step(i: int, x: Tensor, direction: Tensor) -> Tensor:
    """``x' = (sigma'/sigma) x + alpha' (1 - e^(-h)) d``."""
    return SIGMA[i + 1] / SIGMA[i] * x - ALPHA[i + 1] * np.expm1(-H[i]) * direction


def test_dpm_solver_pp_2m_is_the_papers_loop() -> None:
    x, past, v = START, START, None
    for i in range(GRID.steps):
        D = DATA(x, GRID.t[i])
        d = D
        if i > 0:
            r = H[i - 1] / H[i]
            d = D + (D - past) / (2 * r)
            v = d if v is None else (1 - BETA) * v + BETA * d
            d = v
        x, past = step(i, x, d), D
    sampler = DPMSolverPP(beta=BETA, lower_order_final=False)
    found = integrate(sampler.plan(GRID), DATA, START)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


def test_dpm_solver_pp_lowered_to_first_order_goes_without() -> None:
    lowering = DPMSolverPP(beta=BETA, lower_order_final="below_15_steps")
    lowered = lowering.plan(GRID).tables[-1]
    np.testing.assert_allclose(
        lowered[0, [0, 4, 5, 6]], DDIM().plan(GRID).tables[-1][0], atol=1e-15
    )
    assert DPMSolverPP(beta=BETA, lower_order_final=False).plan(GRID).tables[-1, 0, 3] > 0


def test_dpm_solver_pp_of_first_order_blends_every_step_but_the_landing() -> None:
    plan = DPMSolverPP(order=1, beta=BETA).plan(VP.grid(LogSNR(), 5))
    blended = plan.tables[:, 0, plan.slots - 1] > 0
    assert blended.tolist() == [False, True, True, True, False]


def test_unipc_is_a_blend_in_predictor_and_corrector_from_the_point_before() -> None:
    """Each step is predicted with the previous velocity, and repeated with the corrector's."""
    D: list[Tensor] = [DATA(START, GRID.t[0])]
    x, v = START, None

    def blend(direction: Tensor) -> Tensor:
        return direction if v is None else (1 - BETA) * v + BETA * direction

    for i in range(GRID.steps):
        older = (D[-2] - D[-1]) * H[i] / (LAM[i - 1] - LAM[i]) if i else 0 * D[-1]
        predicted = step(i, x, blend(D[-1] + 0.5 * older))
        if i == GRID.steps - 1:
            x = predicted
            break
        arrived = DATA(predicted, GRID.t[i + 1])
        if i == 0:
            corrected = D[-1] + 0.5 * (arrived - D[-1])
        else:
            nodes = np.array([(LAM[i - 1] - LAM[i]) / H[i], 1.0])
            w = _weights(nodes, -H[i], np.expm1(-H[i]))
            corrected = D[-1] + w[0] * older + w[1] * (arrived - D[-1])
        v = blend(corrected)
        x = step(i, x, v)
        D.append(arrived)
    sampler = UniPC(beta=BETA, lower_order_final=False)
    found = integrate(sampler.plan(GRID), DATA, START)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [DPMSolverPP, UniPC])
def test_without_momentum_no_slot_is_spent(kind: Any) -> None:
    plain, moving = (kind(beta=beta).plan(GRID) for beta in (1.0, BETA))
    assert moving.slots == plain.slots + 1
    assert kind().plan(GRID).slots == plain.slots == {DPMSolverPP: 3, UniPC: 4}[kind]


@pytest.mark.parametrize("kind", [DPMSolverPP, UniPC])
def test_a_beta_close_to_one_is_close_to_no_momentum(kind: Any) -> None:
    near, plain = (integrate(kind(beta=b).plan(GRID), DATA, START) for b in (1 - 1e-9, 1.0))
    torch.testing.assert_close(near, plain, rtol=0, atol=1e-7)


def test_momentum_of_a_stochastic_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta is 0\.8; with the variant 'sde' only 1"):
        DPMSolverPP(variant="sde", beta=0.8)


def test_momentum_keeps_a_stiff_run_bounded() -> None:
    """At 1.2 on the real axis, beyond the limit of Adams-Bashforth 2 but within heavy ball's."""
    grid = EDM.grid("linspace", 12, t_start=20.0, t_end=8.0)
    lam = 1.2 / float(grid.sigma[0] - grid.sigma[1])

    def stiff(x: Tensor, t: float) -> Tensor:
        return x - t * lam * x

    ends = {
        beta: float(integrate(HB(order=2.0, beta=beta).plan(grid), stiff, START).abs().max())
        for beta in (1.0, 0.8)
    }
    assert ends[1.0] > 2 * float(START.max())
    assert ends[0.8] < 0.5 * float(START.max())
