"""Spacings of ComfyUI and RES4LYF, compared with levels from their code in float64."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import laplace as distribution

from samplers import (
    BongTangent,
    Exponential,
    KLOptimal,
    Laplace,
    Leading,
    LinearQuadratic,
    NoiseSchedule,
    SGMUniform,
    Spacing,
    Trailing,
)
from samplers.names import named, schedule_type
from samplers.other_names import COMFYUI
from tests.covering import few_of
from tests.samplers.cases import EDM, FLOW, SCHEDULES

SD = SCHEDULES["scaled_linear"]
"""The schedule of Stable Diffusion 1.5, whose sigmas run from 14.6146 down to 0.0292."""

# calculate_sigmas of comfy/samplers.py, and sigmas.py of RES4LYF, without the 0 at the end.
LEVELS: dict[str, tuple[NoiseSchedule, Spacing, list[float]]] = {
    "kl_optimal": (
        SD,
        KLOptimal(),
        [
            14.614641229333659,
            2.6328878577905126,
            1.294767287388064,
            0.7116268131241659,
            0.33563738905184215,
            0.029167158151720367,
        ],
    ),
    "linear_quadratic": (
        FLOW,
        LinearQuadratic(),
        [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875],
    ),
    "linear_quadratic-odd": (
        FLOW,
        LinearQuadratic(),
        [1.0, 0.9875, 0.975, 0.8583333333333333, 0.5333333333333333],
    ),
    "linear_quadratic-of-sd": (
        SD,
        LinearQuadratic(),
        (14.614641229333639 * np.array([1.0, 0.9875, 0.975, 0.85833333, 0.53333333])).tolist(),
    ),
    "laplace": (
        SD,
        Laplace(),
        [
            14.614641229333639,
            1.5811190662193852,
            1.1180270011029743,
            0.8944327811523903,
            0.6324634376784163,
            0.029167158151720367,
        ],
    ),
    "laplace-off-the-middle": (
        EDM,
        Laplace(mean=0.3, scale=0.8),
        [80.0, 2.3502030874368547, 1.3498588075760032, 0.7753027004903318, 0.002],
    ),
    "polyexponential": (
        SD,
        Exponential(rho=2.0),
        [
            14.614641229333632,
            0.9629073796054086,
            0.13799635874248314,
            0.04301673995968544,
            0.029167158151720367,
        ],
    ),
    "bong_tangent": (
        FLOW,
        BongTangent(),
        [
            1.0,
            0.9713438781732047,
            0.9294229578684781,
            0.8628878668400675,
            0.7442997071528249,
            0.5,
            0.21312161793473747,
            0.06964603330644502,
        ],
    ),
    "bong_tangent-two": (FLOW, BongTangent(), [1.0, 0.5]),
}


@pytest.mark.parametrize(("schedule", "spacing", "sigmas"), LEVELS.values(), ids=LEVELS.keys())
def test_levels_are_those_of_the_source(
    schedule: NoiseSchedule, spacing: Spacing, sigmas: list[float]
) -> None:
    grid = schedule.grid(spacing, len(sigmas))
    np.testing.assert_allclose(schedule.noise_level(grid.t[:-1]), sigmas, rtol=1e-8)


def test_a_laplace_distribution_that_is_too_wide_is_cut_off_at_the_range() -> None:
    """Levels are at even probabilities between the cumulative ones of both ends."""
    wide: Any = distribution(loc=0.2, scale=2.0)
    first, last = wide.cdf(np.log(SD.noise_level(np.array([999.0, 0.0]))))
    levels = wide.ppf(np.linspace(first, last, 9))
    grid = SD.grid(Laplace(mean=0.2, scale=2.0), 9)
    np.testing.assert_allclose(SD.noise_level(grid.t[:-1]), np.exp(levels), rtol=1e-9)


def test_kl_optimal_of_automatic1111_ends_one_stride_above() -> None:
    """Its n steps use n + 1 points, of which the last is the cleanest level."""
    ends = np.arctan(SD.noise_level(np.array([999.0, 0.0])))
    angles = ends[0] + (ends[1] - ends[0]) * np.arange(7) / 7
    grid = SD.grid(schedule_type("KL Optimal"), 7)
    np.testing.assert_allclose(SD.noise_level(grid.t[:-1]), np.tan(angles), rtol=1e-8)


@pytest.mark.parametrize("steps", few_of([1, 3, 7, 20, 30, 137], [1, 7, 137]))
def test_simple_counts_down_whole_timesteps_and_rounds_up(steps: int) -> None:
    picked = [999 - int(x * (1000 / steps)) for x in range(steps)]
    assert SD.grid(Trailing(rounding="up"), steps).t[:-1].tolist() == picked


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_normal_is_even_over_the_trained_timesteps_without_rounding(steps: int) -> None:
    times = np.linspace(999, 0, steps)
    np.testing.assert_allclose(SD.grid(SGMUniform(endpoint=True), steps).t[:-1], times)
    assert schedule_type("normal") == schedule_type("Normal") == SGMUniform(endpoint=True)


@pytest.mark.parametrize("steps", few_of([1, 5, 20, 25, 50], [1, 25]))
def test_ddim_uniform_is_leading_where_the_steps_divide_the_timesteps(steps: int) -> None:
    """Otherwise ComfyUI takes more steps than requested, up to the noisiest one on its stride."""
    times = np.arange(1, 1000, 1000 // steps)[::-1]
    assert SD.grid(Leading(), steps).t[:-1].tolist() == times.tolist()


def test_every_scheduler_of_comfyui_is_a_spacing_here() -> None:
    sampler, _ = named("Euler")
    for name, fields in COMFYUI.items():
        spacing = schedule_type(name)
        assert spacing.name == fields["name"]
        for schedule in (SD, FLOW):
            assert np.isfinite(sampler.plan(schedule.grid(spacing, 12)).tables).all(), name
