"""Which plans sample paths of the reverse diffusion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from samplers import NoiseSchedule, Sampler
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.euler import Euler, EulerAncestral
from samplers.lcm import LCM
from samplers.restart import Restart
from samplers.reverse_sde import follows_reverse_sde
from samplers.sa_solver import SASolver
from samplers.score_sde_pc import ScoreSDEPC
from samplers.tcd import TCD
from samplers.timesteps import Trailing
from tests.samplers.cases import DISCRETE, each_schedule

DRAW_IT: list[Sampler] = [
    DDIM(eta=1),
    EulerAncestral(),
    DPMSolverPP(variant="sde"),
    DPMSolverPP(variant="sde", order=3),
    SASolver(),
]
DO_NOT: list[Sampler] = [
    DDIM(),
    DDIM(eta=0.9),
    Euler(),
    EulerAncestral(eta=0.5),
    DPMSolverPP(),
    DPMSolverPPSinglestep(),
    SASolver(tau=0.5),
    ScoreSDEPC(),
    Restart(),
    LCM(),
    TCD(),
]


def named(sampler: Sampler) -> str:
    return repr(sampler)


@each_schedule
def test_ancestral_noise_is_recognised_on_every_schedule(schedule: NoiseSchedule) -> None:
    grid = schedule.grid(Trailing(), 6)
    for sampler in DRAW_IT:
        assert follows_reverse_sde(sampler.plan(grid)), sampler


@pytest.mark.parametrize("sampler", DO_NOT, ids=named)
def test_less_or_more_noise_or_several_evaluations_a_step_are_not_taken_for_it(
    sampler: Sampler,
) -> None:
    assert not follows_reverse_sde(sampler.plan(DISCRETE.grid(Trailing(), 6)))


def test_a_plan_that_turns_back_to_noise_does_not_follow_it() -> None:
    plan = DDIM(eta=1).plan(DISCRETE.grid(Trailing(), 4))
    order = [0, 2, 1, 3, 4]
    assert not follows_reverse_sde(replace(plan, alpha=plan.alpha[order], sigma=plan.sigma[order]))
