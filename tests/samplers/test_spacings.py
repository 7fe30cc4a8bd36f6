"""Spacings by noise level, published tables and listed times, each compared with its source."""

from typing import Any

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

from samplers import SPACINGS, Grid, NoiseSchedule, Spacing
from samplers.align_your_steps import AlignYourSteps
from samplers.beta import Beta, beta_quantile
from samplers.custom_times import Custom
from samplers.exponential import Exponential
from samplers.spacings import spacing_named
from samplers.timesteps import Karras, LCMSpacing, Linspace, LogSNR, SGMUniform, TimeQuadratic
from tests.covering import few_of, spread
from tests.samplers.cases import DISCRETE, EDM, FLOW, SCHEDULES, VP, each_schedule

SVD = NoiseSchedule.edm(sigma_min=0.002, sigma_max=700.0)


@pytest.mark.parametrize(
    "schedule",
    few_of([name for name in SCHEDULES if "flow" not in name], ["vp_linear", "zero_snr", "edm"]),
)
def test_exponential_is_logsnr_where_there_is_no_flow(schedule: str) -> None:
    for steps in (1, 2, 7, 30):
        ours, same = (SCHEDULES[schedule].grid(s, steps) for s in (Exponential(), LogSNR()))
        np.testing.assert_allclose(ours.t, same.t, rtol=1e-9, atol=1e-9)


def test_exponential_is_that_of_k_diffusion() -> None:
    sigmas = np.exp(np.linspace(np.log(80), np.log(0.002), 9))
    np.testing.assert_allclose(EDM.grid(Exponential(), 9).sigma[:-1], sigmas, rtol=1e-12)


SHARED = [("use_exponential_sigmas", Exponential()), ("use_beta_sigmas", Beta(over="sigma"))]


@pytest.mark.parametrize("steps", few_of([2, 3, 8, 20], [3, 20]))
@pytest.mark.parametrize(("option", "spacing"), SHARED)
def test_levels_are_those_of_euler(option: str, spacing: Spacing, steps: int) -> None:
    options: dict[str, Any] = {option: True}
    scheduler: Any = EulerDiscreteScheduler(**options)
    scheduler.set_timesteps(steps)
    grid = DISCRETE.grid(spacing, steps)
    # diffusers interpolates log(sigma / alpha) between trained steps, ours log(alpha).
    sigmas = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(grid.sigma / grid.alpha, sigmas, rtol=2e-4)
    np.testing.assert_allclose(grid.t[:-1], scheduler.timesteps.numpy(), atol=0.1)


@pytest.mark.parametrize("steps", few_of([2, 3, 8, 20], [3, 20]))
@pytest.mark.parametrize(("option", "spacing"), SHARED)
def test_levels_are_those_of_flow_matching(option: str, spacing: Spacing, steps: int) -> None:
    options: dict[str, Any] = {option: True}
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(FLOW.grid(spacing, steps).sigma, sigmas, rtol=1e-5)


# scipy's own search fails at probabilities of 1e-100 and the like.
@given(
    alpha=st.floats(0.3, 5),
    beta=st.floats(0.3, 5),
    probability=st.sampled_from([0.0, 1.0]) | st.floats(1e-9, 1 - 1e-9),
)
def test_quantiles_are_those_of_scipy(alpha: float, beta: float, probability: float) -> None:
    ours = beta_quantile(np.array(probability), alpha, beta)
    assert abs(float(ours) - float(beta_distribution.ppf(probability, alpha, beta))) < 1e-12


def test_quantiles_have_all_their_digits_near_zero() -> None:
    p = np.array([1e-12, 1e-6, 1e-3, 0.1, 0.4])
    for alpha, beta in ((0.6, 0.6), (0.3, 5.0), (5.0, 0.3), (2.0, 3.0)):
        expected = beta_distribution.ppf(p, alpha, beta)
        np.testing.assert_allclose(beta_quantile(p, alpha, beta), expected, rtol=1e-11)


def test_beta_of_one_and_one_is_even() -> None:
    even = Beta(alpha=1.0, beta=1.0)
    np.testing.assert_allclose(
        DISCRETE.grid(even, 8).t, DISCRETE.grid(SGMUniform(), 8).t, atol=1e-9
    )


@pytest.mark.parametrize("steps", few_of([1, 2, 5, 20, 50], [1, 5, 50]))
def test_beta_over_time_is_that_of_comfyui_before_rounding(steps: int) -> None:
    probabilities = 1 - np.linspace(0, 1, steps, endpoint=False)
    times = beta_distribution.ppf(probabilities, 0.6, 0.6) * 999
    np.testing.assert_allclose(DISCRETE.grid(Beta(), steps).t[:-1], times, atol=1e-9)


@pytest.mark.parametrize("over", ["time", "sigma"])
def test_beta_fills_a_range_with_both_ends(over: str) -> None:
    spacing = Beta.model_validate({"over": over})
    grid = VP.grid(spacing, 5, t_start=0.8, t_end=0.1)
    np.testing.assert_allclose(grid.t[[0, -1]], [0.8, 0.1])
    middle = (0.45, VP.noise_level(np.array([0.8, 0.1])).mean())[over == "sigma"]
    found = VP.grid(spacing, 4, t_start=0.8, t_end=0.1).t[2]
    measured = found if over == "time" else VP.noise_level(found)
    assert measured == pytest.approx(middle)


def test_both_parameters_of_beta_act_on_their_own_end() -> None:
    def gaps(**parameters: float) -> tuple[float, float]:
        t = DISCRETE.grid(Beta.model_validate(parameters), 20, t_end=1.0).t
        return t[0] - t[1], t[-2] - t[-1]

    plain = gaps()
    assert gaps(alpha=0.4)[1] < plain[1] / 3
    assert gaps(beta=0.4)[0] < plain[0] / 3


@pytest.mark.parametrize("steps", few_of([1, 2, 7, 20, 400], [1, 7, 400]))
def test_sgm_uniform_is_that_of_comfyui(steps: int) -> None:
    times = np.linspace(999, 0, steps + 1)[:-1]
    np.testing.assert_array_equal(DISCRETE.grid(SGMUniform(), steps).t[:-1], times)
    np.testing.assert_array_equal(
        DISCRETE.grid(Linspace(endpoint=False), steps).t[:-1], np.round(times)
    )


@pytest.mark.parametrize("steps", few_of([2, 7, 20, 50], [2, 20]))
def test_time_quadratic_is_that_of_ddim(steps: int) -> None:
    before_rounding = np.linspace(0, np.sqrt(1000 * 0.8), steps)[::-1] ** 2
    ours = DISCRETE.grid(TimeQuadratic(reach=0.8), steps).t[:-1]
    np.testing.assert_allclose(ours, before_rounding, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_time_quadratic_is_that_of_dpm_solver(steps: int) -> None:
    published = np.linspace(1.0**0.5, 1e-3**0.5, steps + 1) ** 2
    np.testing.assert_allclose(VP.grid(TimeQuadratic(), steps, 1.0, 1e-3).t, published, rtol=1e-12)


def test_time_quadratic_reaches_as_far_as_it_is_told() -> None:
    assert VP.grid(TimeQuadratic(reach=0.8), 5).t[0] == pytest.approx(0.8)
    assert EDM.grid(TimeQuadratic(reach=0.5), 5).sigma[0] == pytest.approx(40)
    assert DISCRETE.grid(TimeQuadratic(), 5).t[0] == pytest.approx(999)


def test_time_quadratic_of_edm_is_karras_of_two() -> None:
    ours, karras = EDM.grid(TimeQuadratic(), 9), EDM.grid(Karras(rho=2.0), 9)
    np.testing.assert_allclose(ours.sigma, karras.sigma, rtol=1e-9)


@pytest.mark.parametrize(
    ("table", "key"), [("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")]
)
def test_ten_steps_are_the_published_ones(table: str, key: str) -> None:
    spacing = AlignYourSteps.model_validate({"table": table})
    grid = SCHEDULES["scaled_linear"].grid(spacing, 10)
    assert grid.t[:-1].tolist() == AysSchedules[f"{key}Timesteps"]
    # Published to three decimals.
    sigmas = AysSchedules[f"{key}Sigmas"]
    np.testing.assert_allclose(grid.sigma / grid.alpha, sigmas, rtol=3e-3, atol=2e-3)


def test_ten_steps_of_video_are_the_published_ones() -> None:
    grid = SVD.grid(AlignYourSteps(table="svd"), 10)
    np.testing.assert_allclose(grid.sigma, AysSchedules["StableDiffusionVideoSigmas"], rtol=1e-12)


@pytest.mark.parametrize(("table", "steps"), spread(["sd15", "svd"], [1, 2, 4, 7, 20, 50]))
def test_other_counts_are_the_authors_interpolation(table: str, steps: int) -> None:
    schedule = SVD if table == "svd" else SCHEDULES["scaled_linear"]
    spacing = AlignYourSteps.model_validate({"table": table})
    sigmas = {
        "sd15": [14.6146, 6.4746, 3.8637, 2.6946, 1.8842, 1.3944, 0.9643, 0.6524, 0.3977, 0.1515,
                 0.0292],
        "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
    }[table]  # fmt: skip
    # loglinear_interp of the authors' quick start, over steps + 1 points.
    points = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(sigmas[::-1]))
    grid = schedule.grid(spacing, steps)
    expected = np.exp(points)[::-1][:-1]
    np.testing.assert_allclose((grid.sigma / grid.alpha)[:-1], expected, rtol=2e-3)


@pytest.mark.parametrize("schedule", ["vp_linear", "flow", "edm"])
def test_the_tables_of_images_need_a_thousand_trained_timesteps(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"^spacing.table is 'sd15', which needs .* 1000 trained"):
        SCHEDULES[schedule].grid(AlignYourSteps(), 10)
    few = NoiseSchedule.from_diffusers({"num_train_timesteps": 200})
    with pytest.raises(ValueError, match=r"^spacing.table is 'sdxl', which needs"):
        few.grid(AlignYourSteps(table="sdxl"), 10)


@each_schedule
def test_the_table_of_video_needs_its_noise(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match=r"^spacing.table is 'svd', which starts at"):
        schedule.grid(AlignYourSteps(table="svd"), 10)


@pytest.mark.parametrize(
    ("schedule", "times"),
    [("linear", (999.0, 500.5, 3.0)), ("flow", (1.0, 0.4)), ("edm", (80.0, 1.0, 0.002))],
)
def test_listed_times_are_the_grid(schedule: str, times: tuple[float, ...]) -> None:
    spacing = Custom(times=times)
    assert spacing.own_steps == len(times)
    assert Karras().own_steps is None
    grid, plain = SCHEDULES[schedule].grid(spacing, len(times)), SCHEDULES[schedule]
    expected = Grid.on_times(plain, np.array(times), clean=True)
    for ours, theirs in ((grid.t, expected.t), (grid.sigma, expected.sigma)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_list_of_json_is_taken_and_a_text_is_not() -> None:
    assert Custom.model_validate({"times": [999, 10]}).times == (999.0, 10.0)
    for wrong in (["999"], [True], "999", [float("inf")]):
        with pytest.raises(ValueError, match="times"):
            Custom.model_validate({"times": wrong})


@pytest.mark.parametrize(
    ("times", "steps", "sentence"),
    [
        (
            (),
            5,
            r"^spacing\.times is empty; it must list one time for each step, in decreasing",
        ),
        ((999.0, 10.0), 5, r"^steps is 5; it must be 2, the number of entries in"),
        ((999.0, 300.0, 400.0), 3, r"^spacing\.times go from 300 to 400; each must be below"),
        ((999.0, 999.0), 2, r"^spacing\.times go from 999 to 999; each must be below"),
        ((1000.0, 1.0), 2, r"^spacing\.times go from 1000 to 1; this model has .* 999 to 0\.$"),
        ((10.0, -1.0), 2, r"^spacing\.times go from 10 to -1; this model has times from 999 to 0"),
    ],
    ids=str,
)
def test_wrong_lists_are_refused(times: tuple[float, ...], steps: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DISCRETE.grid(Custom(times=times), steps)


@pytest.mark.parametrize("spacing", [Custom(times=(0.5,)), AlignYourSteps(), LCMSpacing()], ids=str)
def test_a_range_is_refused_by_spacings_with_times_of_their_own(spacing: Spacing) -> None:
    with pytest.raises(ValueError, match=f"^spacing is '{spacing.name}', which has times of its"):
        VP.grid(spacing, 1, t_start=0.9, t_end=0.1)


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    spread(
        ["vp_linear", "flow", "edm"], [Karras(whole=True), LogSNR(whole=True), Beta(whole=True)]
    ),
)
def test_whole_timesteps_are_refused_where_there_are_none(schedule: str, spacing: Spacing) -> None:
    with pytest.raises(ValueError, match=r"^spacing\.whole is true, which needs a model"):
        SCHEDULES[schedule].grid(spacing, 5)


def test_a_name_stands_for_the_defaults() -> None:
    for kind in SPACINGS:
        assert spacing_named(kind.model_fields["name"].default) == kind.model_validate({})
    by_name, by_object = VP.grid("karras", 7, 0.9, 0.1), VP.grid(Karras(), 7, 0.9, 0.1)
    np.testing.assert_array_equal(by_name.t, by_object.t)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'karas' is not known \(did you mean 'karras'\?\);"):
        VP.grid("karas", 5)
    with pytest.raises(ValueError, match=r"^spacing 'warp' is not known; allowed are: leading, tr"):
        VP.grid("warp", 5)
