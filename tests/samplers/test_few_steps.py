"""Few-step conventions compared with diffusers' schedulers, point by point, on a toy network.

diffusers' schedulers store alphas and angles in float32; here they are given float64 ones, so that
only the last digits differ. Euler's schedulers compute in float32 in any case.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_euler_ancestral_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_lcm,
    scheduling_lcm,
    scheduling_scm,
    scheduling_tcd,
)
from torch import Tensor

from samplers import (
    DDIM,
    LCM,
    TCD,
    Angles,
    Custom,
    Euler,
    EulerAncestral,
    LCMSpacing,
    Linspace,
    NoiseSchedule,
    Plan,
    Trailing,
    integrate,
    preconditioning,
)
from samplers.prediction import PredictionType
from tests.covering import spread

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
START = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
EXACT = 1e-10
SINGLE = 3e-6
"""Relative tolerance where diffusers computes in float32."""


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Set float64 as the default dtype, in which LCMScheduler computes its boundary condition."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(x: Tensor, t: float) -> Tensor:
    """A network that is not linear in x and depends on time, with inputs from the scheduler."""
    return torch.sin(1.7 * x) + 0.4 * torch.cos(x + t / 150)


def noise(stage: int) -> Tensor:
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(START.shape, generator=generator, dtype=torch.float64)


def draws(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    stages = iter(range(50))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise(next(stages)))


def precise(scheduler: Any) -> Any:
    """The scheduler with the cumulative products of its betas in float64."""
    levels = NoiseSchedule.from_diffusers(scheduler.config)
    alpha, _ = levels.level(np.arange(1000.0))
    scheduler.alphas_cumprod = torch.from_numpy(alpha**2)
    scheduler.final_alpha_cumprod = (
        torch.ones((), dtype=torch.float64)
        if scheduler.config.set_alpha_to_one
        else scheduler.alphas_cumprod[0]
    )
    return scheduler


def theirs(
    scheduler: Any, x: Tensor, told: Callable[[float], float] = float, **step: Any
) -> list[Tensor]:
    """The points of a run with diffusers' scheduler; the last is the result."""
    points: list[Tensor] = []
    for t in scheduler.timesteps:
        points.append(x)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, told(t)), t, x, **step)[0]
    return [*points, x]


def ours(plan: Plan, prediction: PredictionType, told: Callable[[float], float]) -> list[Tensor]:
    points: list[Tensor] = []
    levels = iter(zip(plan.alpha, plan.sigma, strict=True))

    def denoise(x: Tensor, t: float) -> Tensor:
        points.append(x.clone())
        _, skip, out = (float(c) for c in preconditioning(prediction, *next(levels)))
        return skip * x + out * network(x, told(t))

    landed = integrate(plan, denoise, START, noise)
    return [*points, landed]


def assert_same(
    plan: Plan,
    reference: Sequence[Tensor],
    prediction: PredictionType = "epsilon",
    told: Callable[[float], float] = float,
    tolerance: float = EXACT,
) -> None:
    """Check that every point of our run equals diffusers'."""
    found = ours(plan, prediction, told)
    assert len(found) == len(reference)
    for mine, other in zip(found, reference, strict=True):
        error = float((mine - other).norm() / other.norm())
        assert error < tolerance, error


PREDICTIONS: list[PredictionType] = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize(("steps", "prediction"), spread([1, 2, 4, 8], PREDICTIONS))
def test_lcm_is_their_scheduler(
    steps: int, prediction: PredictionType, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, scheduling_lcm)
    scheduler = precise(LCMScheduler(prediction_type=prediction, **BETAS))
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(scheduler.config)
    plan = LCM().plan(schedule.grid(LCMSpacing(), steps))
    assert_same(plan, theirs(scheduler, START), prediction)


# DMD2 in four steps, and its one step; Hyper-SD's.
@pytest.mark.parametrize(
    ("timesteps", "spacing"),
    [
        ([999, 749, 499, 249], Trailing()),
        ([399], Custom(times=(399,))),
        ([800], Custom(times=(800,))),
    ],
    ids=["dmd2", "dmd2-1", "hyper-1"],
)
def test_dmd2_and_one_step_models_noise_again_at_fixed_timesteps(
    timesteps: list[int], spacing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, scheduling_lcm)
    scheduler = precise(LCMScheduler(**BETAS))
    scheduler.set_timesteps(timesteps=timesteps)
    schedule = NoiseSchedule.from_diffusers(scheduler.config)
    plan = LCM().plan(schedule.grid(spacing, len(timesteps)))
    assert plan.t[:-1].tolist() == timesteps
    assert_same(plan, theirs(scheduler, START))


@pytest.mark.parametrize(
    ("gamma", "steps", "prediction"), spread([0.0, 0.3, 0.75, 1.0], [1, 2, 4, 7, 8], PREDICTIONS)
)
def test_tcd_is_their_scheduler(
    gamma: float, steps: int, prediction: PredictionType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' last step lands on the first trained timestep, as ours does with such a config."""
    draws(monkeypatch, scheduling_tcd)
    scheduler = precise(TCDScheduler(prediction_type=prediction, **BETAS))
    scheduler.set_timesteps(steps)
    config = {**scheduler.config, "_class_name": "TCDScheduler"}
    plan = TCD(gamma=gamma).plan(NoiseSchedule.from_diffusers(config).grid(LCMSpacing(), steps))
    assert_same(plan, theirs(scheduler, START, eta=gamma), prediction)


@pytest.mark.parametrize(
    ("times", "gamma"),
    spread([(999, 749, 499, 249), (800,), (999, 501, 7)], [0.0, 0.3, 1.0]),
    ids=str,
)
def test_tcd_takes_any_timesteps(
    times: tuple[int, ...], gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, scheduling_tcd)
    scheduler = precise(TCDScheduler(**BETAS))
    scheduler.set_timesteps(timesteps=list(times))
    config = {**scheduler.config, "_class_name": "TCDScheduler"}
    grid = NoiseSchedule.from_diffusers(config).grid(Custom(times=times), len(times))
    assert_same(TCD(gamma=gamma).plan(grid), theirs(scheduler, START, eta=gamma))


@pytest.mark.parametrize(
    ("clean", "steps", "eta"), spread([True, False], [1, 2, 4, 8], [0.0, 1.0], together=2)
)
def test_hyper_sd_of_fixed_steps_is_ddim_trailing(
    steps: int, eta: float, clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, scheduling_ddim)
    options: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = precise(DDIMScheduler(set_alpha_to_one=clean, **options, **BETAS))
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(scheduler.config)
    plan = DDIM(eta=eta).plan(schedule.grid(Trailing(), steps))
    assert_same(plan, theirs(scheduler, START, eta=eta))


def in_picture_space(points: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """Convert points of Euler's schedulers, which are divided by alpha, to ours."""
    return [float(alpha) * x for alpha, x in zip(plan.alpha, points, strict=True)]


@pytest.mark.parametrize(
    ("steps", "prediction"), [(1, "sample"), (2, "epsilon"), (4, "epsilon"), (8, "epsilon")]
)
def test_lightning_and_sd_turbo_are_euler_trailing(steps: int, prediction: PredictionType) -> None:
    scheduler: Any = EulerDiscreteScheduler(
        timestep_spacing="trailing", prediction_type=prediction, **BETAS
    )
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(scheduler.config)
    plan = Euler().plan(schedule.grid(Trailing(), steps))
    reference = in_picture_space(theirs(scheduler, START / plan.alpha[0]), plan)
    assert_same(plan, reference, prediction, tolerance=SINGLE)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sdxl_turbo_is_ancestral_euler_trailing(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, scheduling_euler_ancestral_discrete)
    scheduler: Any = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS)
    scheduler.set_timesteps(steps)
    plan = EulerAncestral().plan(
        NoiseSchedule.from_diffusers(scheduler.config).grid(Trailing(), steps)
    )
    reference = in_picture_space(theirs(scheduler, START / plan.alpha[0]), plan)
    assert_same(plan, reference, tolerance=SINGLE)


# Levels at four steps as the pipelines print them; FLUX.2 klein's shift at 1024 x 1024 is e^2.291.
LISTS: dict[str, tuple[float, Any, list[float]]] = {
    "flux-schnell": (1.0, Trailing(), [1, 0.75, 0.5, 0.25]),
    "z-image-turbo": (3.0, Trailing(), [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]),
    "flux2-klein": (float(np.exp(2.291)), Trailing(), [1, 0.9674, 0.9081, 0.7672]),
    "sd3.5-turbo": (3.0, Linspace(twice_shifted=True), [1, 0.8577, 0.6022, 0.0089]),
}


@pytest.mark.parametrize(("shift", "spacing", "sigmas"), LISTS.values(), ids=LISTS.keys())
def test_flow_models_step_over_their_published_levels(
    shift: float, spacing: Any, sigmas: list[float]
) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    if spacing == Trailing():
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / len(sigmas), len(sigmas)))
    else:
        scheduler.set_timesteps(len(sigmas))
    grid = NoiseSchedule.flow(shift).grid(spacing, len(sigmas))
    np.testing.assert_allclose(grid.sigma[:-1], sigmas, atol=6e-5)

    def told(t: float) -> float:
        # Each side rounds 1000 sigma in its own precision.
        return round(float(t) if t > 1 or t == 0 else 1000 * float(t), 1)

    reference = theirs(scheduler, START, lambda t: round(float(t), 1))
    assert_same(Euler().plan(grid), reference, "flow", told, SINGLE)


def test_flow_models_may_noise_again_at_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = NoiseSchedule.flow(3.0).grid(Linspace(twice_shifted=True), 4)
    kinds: list[tuple[Any, Any]] = [
        (
            scheduling_flow_match_euler_discrete,
            FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        ),
        (scheduling_flow_match_lcm, FlowMatchLCMScheduler(shift=3.0)),
    ]
    for module, scheduler in kinds:
        draws(monkeypatch, module)
        scheduler.set_timesteps(4)
        reference = theirs(scheduler, START, lambda t: round(float(t), 1))
        plan = LCM().plan(grid)
        assert_same(plan, reference, "flow", lambda t: round(1000 * float(t), 1), SINGLE)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sana_sprint_noises_again_at_even_angles_but_for_two(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In our convention latents and the network's output are divided by sigma_data."""
    scheduler: Any = SCMScheduler()
    sigma_data = scheduler.config.sigma_data
    draws(monkeypatch, scheduling_scm)
    angles = np.linspace(np.pi / 2, 0, steps + 1)
    if steps == 2:
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == pytest.approx([1.5708, 1.3, 0])
        angles[1] = 1.3
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    np.testing.assert_allclose(scheduler.timesteps, angles, atol=4e-6)
    scheduler.timesteps = torch.from_numpy(angles)
    x = picture = sigma_data * START
    reference = [START]
    for s in scheduler.timesteps[:-1]:
        x, picture = scheduler.step(
            sigma_data * network(x / sigma_data, float(s)), s, x, return_dict=False
        )
        reference.append(x / sigma_data)
    # diffusers' pipeline decodes the last picture divided by sigma_data.
    reference[-1] = picture / sigma_data
    schedule = NoiseSchedule.from_diffusers({**scheduler.config, "_class_name": "SCMScheduler"})
    assert schedule == NoiseSchedule.trigflow()
    plan = LCM().plan(schedule.grid(Angles(), steps))
    assert_same(plan, reference, "v_prediction")


def test_the_angles_are_the_times_of_flow_matching_that_sana_sprint_is_told() -> None:
    angles = np.array([np.pi / 2, 1.3])
    told = np.sin(angles) / (np.sin(angles) + np.cos(angles))
    np.testing.assert_allclose(NoiseSchedule.flow().grid(Angles(), 2).t[:-1], told, rtol=1e-12)
