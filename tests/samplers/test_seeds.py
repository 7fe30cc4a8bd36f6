"""SEEDS without its noise is DPM-Solver++ singlestep."""

import pytest
import torch

from samplers import NoiseSchedule, Sampler, integrate
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.seeds import SEEDS
from samplers.timesteps import LogSNR
from tests.samplers.cases import EDM, FLOW, VP


@pytest.mark.parametrize(
    ("seeds", "singlestep"),
    [
        (SEEDS(method="midpoint", eta=0.0), DPMSolverPPSinglestep()),
        (SEEDS(method="taylor", eta=0.0), DPMSolverPPSinglestep(solver_type="taylor")),
        (SEEDS(method="three", eta=0.0), DPMSolverPPSinglestep(order=3)),
    ],
    ids=["midpoint", "taylor", "three"],
)
@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_without_noise_it_is_singlestep(
    seeds: Sampler, singlestep: Sampler, schedule: NoiseSchedule
) -> None:
    data = GaussianMixtureDenoiser(schedule)
    grid = schedule.grid(LogSNR(), 6)
    start = torch.linspace(-2, 2, 7, dtype=torch.float64)[None] * grid.start_scale
    ours, same = (integrate(one.plan(grid), data, start) for one in (seeds, singlestep))
    torch.testing.assert_close(ours, same, rtol=1e-10, atol=1e-10)
