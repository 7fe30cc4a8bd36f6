"""Spacings compared with diffusers' timesteps, where a name means the same in both."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray

from samplers import NoiseSchedule, Spacing
from samplers.timesteps import Karras, LCMSpacing, Leading, Linspace, LogSNR, Trailing
from tests.covering import few_of
from tests.samplers.cases import (
    DISCRETE,
    EDM,
    FLOW,
    SCHEDULES,
    SPACING_PAIRS,
    each_kind,
    each_schedule,
    grid_unless_refused,
    label,
    may_refuse,
    said,
)

STEPS = few_of((1, 2, 3, 7, 20, 37, 99, 250), (1, 2, 7, 37, 250))


def diffusers_times(scheduler: Any, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def levels(scheduler: Any) -> NDArray[np.float64]:
    """Levels of diffusers, whose sigma is sigma / alpha here."""
    return scheduler.sigmas.double().numpy()


@pytest.mark.parametrize("steps", STEPS)
def test_leading_and_trailing_are_those_of_ddim(steps: int) -> None:
    leading = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    trailing = DDIMScheduler(timestep_spacing="trailing")
    assert Leading().evaluated(DISCRETE, steps).tolist() == diffusers_times(leading, steps)
    assert Trailing().evaluated(DISCRETE, steps).tolist() == diffusers_times(trailing, steps)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_linspace_is_that_of_ddim(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="linspace")
    assert Linspace().evaluated(DISCRETE, steps).tolist() == diffusers_times(scheduler, steps)


def test_one_step_of_linspace_starts_from_noise_where_diffusers_starts_at_the_clean_end() -> None:
    assert Linspace().evaluated(DISCRETE, 1).tolist() == [999]
    assert diffusers_times(DDIMScheduler(timestep_spacing="linspace"), 1) == [0]


@pytest.mark.parametrize("steps", STEPS)
def test_linspace_without_its_end_is_that_of_the_multistep_solvers(steps: int) -> None:
    ours = Linspace(endpoint=False).evaluated(DISCRETE, steps).tolist()
    assert ours == diffusers_times(DPMSolverMultistepScheduler(), steps)
    assert ours == diffusers_times(UniPCMultistepScheduler(), steps)


@pytest.mark.parametrize("steps", few_of([2, 3, 8, 20, 50], [2, 8, 50]))
def test_karras_is_that_of_euler(steps: int) -> None:
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    grid = DISCRETE.grid(Karras(), steps)
    # Theirs interpolates log(sigma / alpha) between trained steps, ours log(alpha).
    np.testing.assert_allclose(grid.t[:-1], diffusers_times(scheduler, steps), atol=0.05)
    np.testing.assert_allclose(grid.sigma / grid.alpha, levels(scheduler), rtol=2e-4)


# With more steps some time lies so near a half that diffusers and Weft round differently, due to
# the interpolation mentioned above.
@pytest.mark.parametrize("steps", few_of([2, 3, 8, 20], [3, 20]))
@pytest.mark.parametrize(
    ("spacing", "scheduler"),
    [
        (Karras(whole=True), DPMSolverMultistepScheduler(use_karras_sigmas=True)),
        (LogSNR(whole=True), DPMSolverMultistepScheduler(use_lu_lambdas=True)),
    ],
    ids=["karras", "logsnr"],
)
def test_whole_karras_and_logsnr_are_those_of_dpm_solver(
    steps: int, spacing: Spacing, scheduler: DPMSolverMultistepScheduler
) -> None:
    grid = DISCRETE.grid(spacing, steps)
    assert grid.t[:-1].tolist() == diffusers_times(scheduler, steps)
    np.testing.assert_allclose(grid.sigma / grid.alpha, levels(scheduler), rtol=2e-4)


@pytest.mark.parametrize("steps", few_of([1, 2, 3, 4, 5, 7, 8, 20, 50], [1, 3, 7, 50]))
def test_lcm_is_that_of_lcm(steps: int) -> None:
    assert LCMSpacing().evaluated(DISCRETE, steps).tolist() == diffusers_times(
        LCMScheduler(), steps
    )


def test_distilled_steps_that_do_not_divide_the_trained_ones_are_those_of_lcm() -> None:
    theirs = diffusers_times(LCMScheduler(original_inference_steps=30), 7)
    assert LCMSpacing(distilled_steps=30).evaluated(DISCRETE, 7).tolist() == theirs


def test_four_steps_of_lcm_are_the_published_ones() -> None:
    assert LCMSpacing().evaluated(DISCRETE, 4).tolist() == [999, 759, 499, 259]


def test_karras_is_equation_5_of_edm() -> None:
    ramp = np.arange(7) / 6
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(Karras().evaluated(EDM, 7), sigmas, rtol=1e-10)


@each_schedule
def test_logsnr_is_even_in_log_snr(schedule: NoiseSchedule) -> None:
    lam = schedule.grid(LogSNR(), 9).half_log_snr[:-1]
    np.testing.assert_allclose(np.diff(lam, 2), 0, atol=1e-7)


def test_continuous_schedules_have_even_strides() -> None:
    np.testing.assert_allclose(Trailing().evaluated(FLOW, 4), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(Linspace().evaluated(FLOW, 4), np.linspace(1, 0.001, 4))
    np.testing.assert_allclose(Leading().evaluated(FLOW, 4), np.linspace(1, 0.001, 5)[1:])
    shifted = NoiseSchedule.flow(shift=3.0)
    np.testing.assert_allclose(Trailing().evaluated(shifted, 4), [1, 0.9, 0.75, 0.5])


@each_kind(cells=SPACING_PAIRS)
def test_times_fall_from_no_higher_than_the_noisiest_level(
    cells: list[tuple[Spacing, NoiseSchedule]],
) -> None:
    for (spacing, schedule), steps in product(cells, (1, 2, 3, 20, 50)):
        grid = grid_unless_refused(schedule, spacing, steps)
        if grid is None:
            assert may_refuse(spacing, schedule)
            continue
        where = f"{label(spacing)} on {said(schedule)}, {steps} steps"
        assert grid.steps == steps, where
        assert (np.diff(grid.half_log_snr[:-1]) > 0).all(), where
        assert grid.t[0] <= schedule.t_start * (1 + 1e-12), where
        assert (grid.sigma[:-1] > 0).all(), where


def test_more_steps_than_the_spacing_has_are_refused() -> None:
    for spacing in (Leading(), Trailing(), Linspace()):
        with pytest.raises(
            ValueError,
            match="steps is 1001; at most 1000, the number of the model's trained timesteps",
        ):
            DISCRETE.grid(spacing, 1001)
    with pytest.raises(ValueError, match="steps is 51; the spacing 'lcm' has at most 50"):
        DISCRETE.grid(LCMSpacing(), 51)
    few = NoiseSchedule.from_diffusers({"num_train_timesteps": 40})
    with pytest.raises(
        ValueError, match="distilled_steps is 50; at most 40, the number of the model's trained"
    ):
        few.grid(LCMSpacing(), 4)


def test_a_thousand_steps_fit_a_thousand_trained_ones() -> None:
    for spacing in (Leading(offset=0), Trailing(), Linspace()):
        assert DISCRETE.grid(spacing, 1000).t.tolist() == [*range(999, -1, -1), 0]
    with pytest.raises(ValueError, match=r"from 999 to 999; .* ask for fewer steps"):
        DISCRETE.grid(Leading(), 1000)


@pytest.mark.parametrize("schedule", ["vp_linear", "flow", "edm"])
def test_the_spacing_of_lcm_needs_trained_timesteps(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"spacing is 'lcm', which needs .* use 'trailing'"):
        SCHEDULES[schedule].grid(LCMSpacing(), 4)
