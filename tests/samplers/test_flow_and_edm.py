"""Flow matching and EDM compared with diffusers' schedulers, with exact denoisers as the network.

The grid consists of diffusers' own sigmas, so that steps and preconditioning are compared.
"""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ltx_euler_ancestral_rf as scheduling_ltx
from torch import Tensor

from samplers import Grid, NoiseSchedule, Sampler, integrate, preconditioning
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.euler import Euler, EulerAncestral
from samplers.gaussian import GaussianMixtureDenoiser
from samplers.heun import Heun
from samplers.noise_schedule import FlowMatching
from samplers.timesteps import Karras, Linspace, Trailing
from samplers.unipc import UniPC
from tests.covering import few_of, spread
from tests.samplers.cases import EDM, FLOW

STEPS = 10
START = torch.linspace(-2, 2, 41)[None]
NOISE = torch.randn(STEPS, *START.shape, generator=torch.Generator().manual_seed(9))


def theirs(scheduler: Any, x: Tensor, network: Any) -> Tensor:
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, float(t)), t, x).prev_sample
    return x


def ours(schedule: NoiseSchedule, scheduler: Any, sampler: Sampler, x: Tensor) -> Tensor:
    # Heun's scheduler repeats each inner level for the second evaluation.
    sigmas = list(dict.fromkeys(scheduler.sigmas.double().tolist()))
    grid = Grid.on_times(schedule, np.array(sigmas[:-1]), clean=True)
    return integrate(sampler.plan(grid), GaussianMixtureDenoiser(schedule), x)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_by_level_are_those_of_comfyui_on_flows(
    eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sample_euler_ancestral_RF, as in diffusers for LTX; elsewhere the two agree at eta 1."""
    noise = iter(NOISE)
    monkeypatch.setattr(scheduling_ltx, "randn_tensor", lambda *_, **__: next(noise))
    scheduler = LTXEulerAncestralRFScheduler(eta=eta)
    schedule = NoiseSchedule.flow(shift=3.0)
    grid, data = schedule.grid(Trailing(), STEPS), GaussianMixtureDenoiser(schedule)
    scheduler.set_timesteps(sigmas=grid.sigma.tolist())

    def velocity(x: Tensor, t: float) -> Tensor:
        return (x - data(x, t / 1000)) / (t / 1000)

    sampler = EulerAncestral(eta=eta, below="level")
    landed = integrate(sampler.plan(grid), data, START, NOISE.__getitem__)
    torch.testing.assert_close(landed, theirs(scheduler, START, velocity), rtol=0, atol=1e-5)
    if eta == 1:
        exploding = EDM.grid(Karras(), STEPS)
        expected = EulerAncestral().plan(exploding).tables
        np.testing.assert_allclose(sampler.plan(exploding).tables, expected, atol=1e-12)


FLOW_OPTIONS: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_PAIRS: dict[str, tuple[Any, Sampler]] = {
    "euler": (FlowMatchEulerDiscreteScheduler(shift=3.0), Euler()),
    "heun": (FlowMatchHeunDiscreteScheduler(shift=3.0), Heun()),
    "dpm_solver_pp": (
        DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW_OPTIONS),
        DPMSolverPP(),
    ),
    "dpm_solver_pp-3": (
        DPMSolverMultistepScheduler(solver_order=3, **FLOW_OPTIONS),
        DPMSolverPP(order=3),
    ),
    "unipc": (UniPCMultistepScheduler(flow_shift=3.0, **FLOW_OPTIONS), UniPC()),
    "unipc-3": (UniPCMultistepScheduler(solver_order=3, **FLOW_OPTIONS), UniPC(order=3)),
}


@pytest.mark.parametrize(("scheduler", "sampler"), FLOW_PAIRS.values(), ids=FLOW_PAIRS.keys())
def test_flow_matching_steps_are_those_of_diffusers(scheduler: Any, sampler: Sampler) -> None:
    scheduler.set_timesteps(STEPS)
    data = GaussianMixtureDenoiser(FLOW)
    sigmas = dict(zip(scheduler.timesteps.tolist(), _at_timesteps(scheduler), strict=True))

    def velocity(x: Tensor, t: float) -> Tensor:
        return (x - data(x, sigmas[t])) / sigmas[t]

    reference = theirs(scheduler, START, velocity)
    torch.testing.assert_close(ours(FLOW, scheduler, sampler, START), reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("shift", "steps"), spread([1.0, 3.0], [1, 4, 28]))
def test_trailing_levels_are_those_of_flow_matching_pipelines(shift: float, steps: int) -> None:
    """The pipelines pass ``linspace(1, 1 / N, N)`` to Euler's scheduler, which shifts it."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    schedule = NoiseSchedule.from_diffusers(scheduler.config)
    grid = schedule.grid(Trailing(), steps)
    np.testing.assert_allclose(grid.sigma, scheduler.sigmas.numpy(), rtol=1e-6)
    told = schedule.conditioning(grid.t[:-1])
    np.testing.assert_allclose(told, scheduler.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_linspace_levels_are_theirs_but_for_a_second_shift_of_the_last(
    kind: Any, shift: float
) -> None:
    """By default diffusers' schedulers shift the smallest trained level a second time."""
    scheduler = kind(shift=shift)
    scheduler.set_timesteps(STEPS)
    schedule = FlowMatching(shift)
    levels = list(dict.fromkeys(scheduler.sigmas.double().tolist()))
    last = float(schedule.shifted(np.array(schedule.t_end)))
    # Between two given levels, the same number of steps has the same spacing.
    grid = schedule.grid(Linspace(), STEPS - 1, t_end=last)
    np.testing.assert_allclose(grid.sigma, levels[:-1], rtol=1e-5)
    assert (last > 2 * schedule.t_end) == (shift > 1)


@pytest.mark.parametrize("steps", few_of([1, 4, 15], [1, 4]))
@pytest.mark.parametrize("sampler", [Euler(), Heun()], ids=["euler", "heun"])
def test_whole_flow_runs_over_our_own_grids_are_those_of_diffusers(
    sampler: Sampler, steps: int
) -> None:
    """From pure noise to the clean picture, in float32, on the pipelines' levels."""
    shift = 3.0
    schedule = NoiseSchedule.flow(shift)
    data = GaussianMixtureDenoiser(schedule)
    grid = schedule.grid(Trailing(), steps)
    if isinstance(sampler, Euler):
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler = FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(steps)
        levels = torch.from_numpy(grid.sigma).float()
        inner = levels[1:-1].repeat_interleave(2)
        scheduler.sigmas = torch.cat([levels[:1], inner, levels[-1:]])
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]

    def velocity(x: Tensor, t: float) -> Tensor:
        return (x - data(x, t / 1000)) / (t / 1000)

    plan = sampler.plan(grid)
    reference = theirs(scheduler, START, velocity)
    landed = integrate(plan, data, START)
    torch.testing.assert_close(landed, reference, rtol=0, atol=2e-5)


def _at_timesteps(scheduler: Any) -> list[float]:
    """Sigma at each evaluation; some schedulers round the timestep that the network is given."""
    return scheduler.sigmas[: len(scheduler.timesteps)].double().tolist()


EDM_PAIRS: dict[str, tuple[Any, Sampler]] = {
    "euler": (EDMEulerScheduler(), Euler()),
    **{
        f"dpm_solver_pp-{order}": (
            EDMDPMSolverMultistepScheduler(solver_order=order),
            DPMSolverPP.model_validate({"order": order}),
        )
        for order in (1, 2, 3)
    },
}


@pytest.mark.parametrize(("scheduler", "sampler"), EDM_PAIRS.values(), ids=EDM_PAIRS.keys())
def test_edm_steps_are_those_of_diffusers(scheduler: Any, sampler: Sampler) -> None:
    scheduler.set_timesteps(STEPS)
    schedule = NoiseSchedule.from_diffusers(scheduler.config)
    data = GaussianMixtureDenoiser(schedule)
    sigma_data = scheduler.config.sigma_data

    def network(scaled: Tensor, c_noise: float) -> Tensor:
        sigma = np.exp(4 * c_noise)
        c_in, c_skip, c_out = (
            float(c) for c in preconditioning("edm", np.ones(()), np.array(sigma), sigma_data)
        )
        x = scaled / c_in
        return (data(x, sigma) - c_skip * x) / c_out

    start = START * scheduler.init_noise_sigma
    reference = theirs(scheduler, start, network)
    torch.testing.assert_close(
        ours(schedule, scheduler, sampler, start), reference, rtol=0, atol=2e-4
    )


def test_edm_levels_and_what_the_network_is_told_are_those_of_diffusers() -> None:
    scheduler: Any = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(STEPS)
    grid = EDM.grid(Karras(), STEPS)
    np.testing.assert_allclose(grid.sigma, scheduler.sigmas.double().numpy(), rtol=1e-5)
    told = EDM.conditioning(grid.t[:-1])
    np.testing.assert_allclose(told, scheduler.timesteps.numpy(), rtol=1e-5)
