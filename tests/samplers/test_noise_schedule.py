"""Levels of the schedules and their inverse, compared with diffusers."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from samplers import SAMPLERS, NoiseSchedule
from samplers.levels import F64
from samplers.noise_schedule import EDM, DiscreteVP, FlowMatching, LinearVP, TrigFlow
from tests.samplers.cases import SCHEDULES, each_schedule

BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "num_train_timesteps": 200},
    {"trained_betas": [0.01, 0.02, 0.05, 0.1]},
]


@pytest.mark.parametrize("config", BETAS, ids=str)
def test_alphas_are_those_of_diffusers(config: dict[str, Any]) -> None:
    theirs = DDIMScheduler(**config).alphas_cumprod.double().numpy()
    ours = NoiseSchedule.from_diffusers(config)
    assert isinstance(ours, DiscreteVP)
    alpha, sigma = ours.level(np.arange(float(ours.whole_timesteps)))
    # diffusers' is a product of up to a thousand float32 numbers.
    np.testing.assert_allclose(alpha**2, theirs, rtol=3e-5)
    np.testing.assert_allclose(sigma**2, 1 - theirs, rtol=1e-3)


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, LCMScheduler, PNDMScheduler])
def test_a_config_without_betas_has_those_of_its_class(kind: Any) -> None:
    theirs = kind().alphas_cumprod.double().numpy()
    ours = NoiseSchedule.from_diffusers({"_class_name": kind.__name__})
    alpha, _ = ours.level(np.arange(1000.0))
    np.testing.assert_allclose(alpha**2, theirs, rtol=3e-5)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    theirs = EulerDiscreteScheduler(rescale_betas_zero_snr=True, **config)
    ours = NoiseSchedule.from_diffusers(config | {"rescale_betas_zero_snr": True})
    alpha, _ = ours.level(np.arange(1000.0))
    np.testing.assert_allclose(alpha**2, theirs.alphas_cumprod.double().numpy(), rtol=3e-4)


ZERO_SNR: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
}
ALL_NOISE = {**ZERO_SNR, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def test_zero_terminal_snr_is_exact_where_that_of_diffusers_is() -> None:
    theirs = DDIMScheduler(**ZERO_SNR).alphas_cumprod.double().numpy()
    ours = NoiseSchedule.from_diffusers(ALL_NOISE)
    alpha, sigma = ours.level(np.arange(1000.0))
    assert theirs[-1] == 0
    np.testing.assert_allclose(alpha**2, theirs, rtol=3e-4, atol=1e-12)
    assert np.float32(sigma[-1]) == 1
    # Between trained steps, also next to the last one.
    t = np.array([0.0, 0.5, 500.2, 997.5, 998.0, 998.9, 999.0])
    np.testing.assert_allclose(ours.time_of_half_log_snr(ours.half_log_snr(t)), t, atol=1e-9)
    np.testing.assert_allclose(ours.time_of_noise_level(ours.noise_level(t)), t, atol=1e-9)
    # At pure noise, a noise prediction says nothing about the picture.
    of_noise = NoiseSchedule.from_diffusers({**ALL_NOISE, "prediction_type": "epsilon"})
    assert of_noise.level(np.array(999.0))[0] == pytest.approx(2.0**-12)


def test_every_sampler_starts_from_noise_alone() -> None:
    """The data is one picture, which follows from velocities at every level, but not from noise."""
    grid = NoiseSchedule.from_diffusers(ALL_NOISE).grid("trailing", 5)
    noise, picture = np.random.default_rng(1).standard_normal((2, 64))
    for kind in SAMPLERS:
        fields: dict[str, Any] = {"statistics": "none"} if "statistics" in kind.model_fields else {}
        plan = kind.model_validate(fields).plan(grid)
        columns = np.zeros((plan.slots + 3, 64))
        columns[0], columns[-1] = plan.start_scale * noise, 1
        for stage, table in enumerate(plan.tables):
            alpha, sigma = plan.alpha[stage], plan.sigma[stage]
            eps = (columns[0] - alpha * picture) / sigma
            columns[-3] = alpha * columns[0] - sigma * (alpha * eps - sigma * picture)
            columns[: plan.slots] = table @ columns
        np.testing.assert_allclose(columns[0], picture, atol=1e-9, err_msg=kind.__name__)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_are_those_of_diffusers(shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = NoiseSchedule.from_diffusers(dict(scheduler.config))
    assert isinstance(ours, FlowMatching)
    sigmas = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(ours.shifted(np.linspace(1, 0.001, 1000)), sigmas, rtol=1e-5)
    np.testing.assert_allclose(ours.uniform(1000, 1.0, ours.t_end), sigmas, rtol=1e-5)
    np.testing.assert_allclose(ours.conditioning(sigmas), scheduler.timesteps.numpy(), rtol=1e-5)


def test_levels_stretched_to_a_terminal_sigma_are_those_of_diffusers() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7))
    ours = NoiseSchedule.flow(3.0, terminal=0.02, steps=7)
    theirs = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(ours.uniform(8, 1.0, 0.0), theirs, rtol=1e-5, atol=1e-12)
    t = np.linspace(0, 1, 50)
    np.testing.assert_allclose(ours.time_of_measure(ours.measure(t)), t, atol=1e-12)
    assert NoiseSchedule.flow(3.0, terminal=0.02, steps=1) == NoiseSchedule.flow(3.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"terminal": 0.02}, "terminal and steps go together; give both or neither"),
        ({"terminal": 1.0, "steps": 4}, "terminal is 1; it must be above 0 and below 1"),
    ],
)
def test_a_terminal_sigma_is_a_share_of_a_number_of_steps(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        NoiseSchedule.flow(**options)


def test_configs_choose_the_kind_of_schedule() -> None:
    kind = NoiseSchedule.from_diffusers
    assert kind({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}) == FlowMatching(3)
    assert kind({"_class_name": "FlowMatchHeunDiscreteScheduler"}) == FlowMatching(1)
    assert kind({"use_flow_sigmas": True, "flow_shift": 2.0}) == FlowMatching(2)
    edm = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 50.0}
    assert kind(edm) == EDM(0.01, 50)
    assert kind({"_class_name": "SCMScheduler", "sigma_data": 0.5}) == TrigFlow()
    assert isinstance(kind({}), DiscreteVP)


def test_configs_of_schedulers_in_memory_lack_the_class_and_are_known_all_the_same() -> None:
    kind = NoiseSchedule.from_diffusers
    assert "_class_name" not in FlowMatchEulerDiscreteScheduler().config
    assert kind(FlowMatchEulerDiscreteScheduler(shift=2.0).config) == FlowMatching(2)
    assert kind(EDMEulerScheduler(sigma_max=50.0).config) == EDM(0.002, 50)
    assert kind(UniPCMultistepScheduler(use_flow_sigmas=True).config) == FlowMatching(1)
    assert isinstance(kind(UniPCMultistepScheduler().config), DiscreteVP)


def test_unknown_schedules_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="beta_schedule is 'sigmoid'; allowed are linear, scaled_"):
        NoiseSchedule.from_diffusers({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="use_dynamic_shifting is true; only a shift that is the"):
        NoiseSchedule.from_diffusers(
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
        )


@pytest.mark.parametrize("shift", [0.0, -1.0, np.nan, np.inf])
def test_a_shift_is_finite_and_above_zero(shift: float) -> None:
    refusal = pytest.raises(ValueError, match=f"shift is {shift:g}; it must be finite and above 0")
    with refusal:
        NoiseSchedule.flow(shift)
    with refusal:
        NoiseSchedule.from_diffusers({"shift": shift})


@pytest.mark.parametrize(("least", "most"), [(0.0, 20.0), (-0.1, 20.0), (20.0, 0.1), (0.1, np.nan)])
def test_linear_betas_are_positive_and_do_not_fall(least: float, most: float) -> None:
    with pytest.raises(ValueError, match=f"beta_min is {least:g} and beta_max is {most:g}; beta_m"):
        NoiseSchedule.vp_linear(least, most)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
@pytest.mark.parametrize(("first", "last"), [(0.02, 1e-4), (-1e-4, 0.02), (1e-4, 1.0), (0.0, 0.02)])
def test_betas_of_a_config_are_shares_that_do_not_fall(
    kind: str, first: float, last: float
) -> None:
    with pytest.raises(ValueError, match=f"beta_start is {first:g} and beta_end is {last:g}; beta"):
        NoiseSchedule.from_diffusers({"beta_schedule": kind, "beta_start": first, "beta_end": last})


@pytest.mark.parametrize("betas", [[0.1, -0.2], [0.1, 1.0], [0.0, 0.1], [0.1, np.nan], [0.1]])
def test_listed_betas_are_shares(betas: list[float]) -> None:
    with pytest.raises(
        ValueError, match="trained_betas must be a list of at least 2 numbers, each"
    ):
        NoiseSchedule.from_diffusers({"trained_betas": betas})


@pytest.mark.parametrize("ends", [(0.0, 80.0), (-1.0, 80.0), (80.0, 80.0), (np.nan, 80.0)], ids=str)
def test_sigmas_of_edm_are_positive_and_rise(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"sigma_min is .* and sigma_max is 80; sigma_min must be"):
        NoiseSchedule.edm(*ends)


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "linear"}, {"use_flow_sigmas": True}], ids=str
)
def test_a_model_has_at_least_two_trained_timesteps(config: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="num_train_timesteps is 1; it must be a whole number from 2"
    ):
        NoiseSchedule.from_diffusers({**config, "num_train_timesteps": 1})


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "linear"}, {"use_flow_sigmas": True}], ids=str
)
def test_a_count_of_trained_timesteps_that_no_memory_holds_is_refused(
    config: dict[str, Any],
) -> None:
    refusal = "num_train_timesteps is 1000000000000; it must be a whole number from 2 to 100000."
    with pytest.raises(ValueError, match=re.escape(refusal)):
        NoiseSchedule.from_diffusers({**config, "num_train_timesteps": 10**12})
    assert NoiseSchedule.from_diffusers({**config, "num_train_timesteps": 100_000}).t_start > 0


def test_what_is_no_number_is_refused_by_the_name_of_its_argument() -> None:
    """Model files may contain strings, null and booleans where numbers are expected."""
    vp = NoiseSchedule.vp_linear()
    kind = NoiseSchedule.from_diffusers
    makers: dict[str, Callable[[Any], object]] = {
        "shift": NoiseSchedule.flow,
        "beta_min": NoiseSchedule.vp_linear,
        "sigma_max": lambda value: NoiseSchedule.edm(sigma_max=value),
        "beta_start": lambda value: kind({"beta_start": value}),
        "beta_end": lambda value: kind({"beta_end": value}),
        "sigma_min": lambda value: kind({"_class_name": "EDMEulerScheduler", "sigma_min": value}),
        "t_start": lambda value: vp.grid("logsnr", 5, t_start=value),
        "t_end": lambda value: vp.grid("logsnr", 5, t_end=value),
    }
    for name, make in makers.items():
        for wrong in ("0.5", True, [1]):
            refusal = re.escape(f"{name} is {wrong!r}; it must be a number.")
            with pytest.raises(ValueError, match=refusal):
                make(wrong)
    for wrong in ("x", [0.1, None]):
        with pytest.raises(ValueError, match="trained_betas must be a list of at least 2 numbers"):
            kind({"trained_betas": wrong})
    with pytest.raises(ValueError, match="shift is a whole number that is too large"):
        NoiseSchedule.flow(shift=10**400)
    with pytest.raises(ValueError, match="beta_start is None; it must be a number"):
        kind({"beta_start": None})


@given(name=st.sampled_from(sorted(SCHEDULES)), share=st.floats(0, 1))
def test_times_survive_the_way_to_half_log_snr_and_back(name: str, share: float) -> None:
    schedule = SCHEDULES[name]
    start = min(schedule.t_start, 0.999999) if isinstance(schedule, FlowMatching) else None
    high = schedule.t_start if start is None else start
    t = np.array(schedule.t_end + share * (high - schedule.t_end))
    back = schedule.time_of_half_log_snr(schedule.half_log_snr(t))
    np.testing.assert_allclose(back, t, rtol=1e-8, atol=1e-8)


@given(name=st.sampled_from(sorted(SCHEDULES)), share=st.floats(0, 1))
def test_half_log_snrs_survive_the_way_to_times_and_back(name: str, share: float) -> None:
    schedule = SCHEDULES[name]
    high = float(schedule.half_log_snr(np.array(schedule.t_end)))
    low = max(float(schedule.half_log_snr(np.array(schedule.t_start))), -12.0)
    lam = np.array(low + share * (high - low))
    back = schedule.half_log_snr(schedule.time_of_half_log_snr(lam))
    np.testing.assert_allclose(back, lam, rtol=1e-8, atol=1e-8)


@each_schedule
def test_levels_agree_with_half_log_snr_and_keep_their_relation(schedule: NoiseSchedule) -> None:
    t = np.linspace(schedule.t_end, schedule.t_start, 50)[:-1]
    alpha, sigma = schedule.level(t)
    np.testing.assert_allclose(np.log(alpha / sigma), schedule.half_log_snr(t), atol=1e-9)
    assert (np.diff(schedule.half_log_snr(t)) < 0).all()
    relation: dict[type[NoiseSchedule], F64] = {
        DiscreteVP: alpha**2 + sigma**2,
        LinearVP: alpha**2 + sigma**2,
        FlowMatching: alpha + sigma,
        TrigFlow: alpha**2 + sigma**2,
        EDM: alpha,
    }
    np.testing.assert_allclose(relation[type(schedule)], 1, rtol=1e-12)


def test_log_snr_keeps_its_digits_near_the_clean_end() -> None:
    schedule = NoiseSchedule.vp_linear()
    # beta_min t / 2 is log alpha to first order, so sigma^2 is beta_min t.
    for t in (1e-6, 1e-12):
        assert schedule.half_log_snr(np.array(t)) == pytest.approx(-0.5 * np.log(0.1 * t), rel=1e-5)


def test_networks_are_told_what_they_were_trained_on() -> None:
    t = np.array([0.5, 0.25])
    assert NoiseSchedule.flow().conditioning(t).tolist() == [500, 250]
    assert NoiseSchedule.vp_linear().conditioning(t).tolist() == [0.5, 0.25]
    np.testing.assert_allclose(NoiseSchedule.edm().conditioning(t), np.log(t) / 4)


def test_alpha_falls_to_the_last_step_of_zero_terminal_snr_where_that_of_diffusers_rises() -> None:
    theirs = EulerDiscreteScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert theirs[-1] > theirs[-2]
    alpha, _ = SCHEDULES["zero_snr"].level(np.arange(1000.0))
    assert (np.diff(alpha) < 0).all()
