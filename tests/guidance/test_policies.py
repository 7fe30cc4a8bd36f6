"""The stages at which the second prediction is evaluated."""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance import POLICIES, Policy, Rows
from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.embedded import Embedded
from guidance.interval import Interval
from guidance.linear_adaptive import LinearAdaptive
from guidance.residual import Residual
from guidance.reuse import Reuse
from tests.guidance.cases import draw, with_other

each_kind = pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.__name__)

NOISE_RATIO = np.array([np.inf, 5.43, 5.42, 1.0, 0.29, 0.28, 0.1])
PROGRESS = np.arange(7) / 7


def settled(
    rows: Rows, *thresholds: float, space: Literal["denoised", "noise"] = "noise"
) -> Tensor:
    settings = [Adaptive(threshold=t, space=space) for t in thresholds]
    return Adaptive.settled(rows, Adaptive.parameters(settings, rows.x[:1]))


def test_always_is_at_every_stage() -> None:
    assert Always().evaluates(NOISE_RATIO, PROGRESS).all()
    assert not Always.adapts


def test_interval_is_open_below_and_closed_above() -> None:
    """Equation 5: sigma in (low, high]."""
    answer = Interval(low=0.28, high=5.42).evaluates(NOISE_RATIO, PROGRESS)
    assert answer.tolist() == [False, False, True, True, True, False, False]


def test_interval_of_steps_is_closed_below_and_open_above() -> None:
    everywhere = np.ones(4)
    answer = Interval(start=0.25, stop=0.75).evaluates(everywhere, np.arange(4) / 4)
    assert answer.tolist() == [False, True, True, False]


def test_both_intervals_must_hold() -> None:
    answer = Interval(start=0.4).evaluates(NOISE_RATIO, PROGRESS)
    assert answer.tolist() == [False, False, False, True, True, False, False]


def test_pure_noise_is_outside_any_interval() -> None:
    assert not Interval(low=0, high=1e30).evaluates(NOISE_RATIO, PROGRESS)[0]


def test_empty_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match="low is 2 and high 1; low must be below high"):
        Interval(low=2, high=1)
    with pytest.raises(ValueError, match=r"start is 0\.5 and stop 0\.5; start must be below stop"):
        Interval(start=0.5, stop=0.5)


def test_adaptive_evaluates_until_it_settles() -> None:
    assert Adaptive().evaluates(NOISE_RATIO, PROGRESS).all()
    assert Adaptive.adapts


@pytest.mark.parametrize("space", ["denoised", "noise"])
@given(seed=st.integers(0, 200), threshold=st.floats(-1, 1))
def test_rows_settle_by_the_cosine_of_their_predictions(
    space: Literal["denoised", "noise"], seed: int, threshold: float
) -> None:
    rows = draw(6, seed)
    cosines = []
    for i in range(6):
        x, a, s, c, u = (
            getattr(rows, name)[i].numpy().ravel()
            for name in ("x", "alpha", "sigma", "cond", "other")
        )
        noise, second = ((x - a * c) / s, (x - a * u) / s) if space == "noise" else (c, u)
        cosines.append(noise @ second / np.sqrt((noise @ noise) * (second @ second)))
    clear = np.abs(np.array(cosines) - threshold) > 1e-9
    answer = settled(rows, *[threshold] * 6, space=space).numpy()
    assert (answer == (np.array(cosines) >= threshold))[clear].all()


@given(seed=st.integers(0, 200), thresholds=st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_a_higher_threshold_never_settles_earlier(seed: int, thresholds: list[float]) -> None:
    row = draw(1, seed)
    repeated = Rows(
        **{
            name: getattr(row, name).repeat_interleave(len(thresholds), 0)
            for name in Rows.__slots__
        }
    )
    answer = settled(repeated, *sorted(thresholds)).tolist()
    assert answer == sorted(answer, reverse=True)


def test_equal_predictions_settle_below_one_and_opposite_noises_never() -> None:
    rows = draw(2)
    assert settled(with_other(rows, rows.cond), 0.999999, 0.5).all()
    away = (2 * rows.x - rows.alpha * rows.cond) / rows.alpha
    assert not settled(with_other(rows, away), 0.0, -0.999).any()


def test_with_several_branches_all_must_agree() -> None:
    rows = draw(2, branches=2)
    away = (2 * rows.x - rows.alpha * rows.cond) / rows.alpha
    one = replace(rows, others=torch.stack([rows.cond, away], 1))
    both = replace(rows, others=torch.stack([rows.cond, rows.cond], 1))
    assert settled(both, 0.999, 0.999).all()
    assert not settled(one, 0.0, 0.0).any()


def test_near_the_clean_end_denoised_predictions_agree_long_before_the_noises_do() -> None:
    rows = draw(1)
    rows = replace(
        rows,
        x=rows.cond + 0.01 * rows.x,
        alpha=torch.full_like(rows.alpha, 0.99995),
        sigma=torch.full_like(rows.sigma, 0.01),
    )
    other = rows.cond + 0.02 * (rows.other - rows.cond)
    assert settled(with_other(rows, other), 0.999, space="denoised")
    assert not settled(with_other(rows, other), 0.99, space="noise")


def test_at_pure_noise_the_noises_agree_whatever_the_pictures() -> None:
    """The reason why denoised predictions are compared by default."""
    rows = replace(draw(1), alpha=torch.zeros(1, 1, 1, 1), sigma=torch.ones(1, 1, 1, 1))
    assert settled(rows, 0.999999, space="noise")
    assert not settled(with_other(rows, -rows.cond), -0.9, space="denoised")
    assert Adaptive().space == "denoised"


def test_embedded_never_evaluates_and_tells_the_network() -> None:
    assert not Embedded().evaluates(NOISE_RATIO, PROGRESS).any()
    assert not Embedded().estimated(NOISE_RATIO, PROGRESS).any()
    assert Embedded.embeds


def test_an_interval_that_holds_no_stage_acts_nowhere() -> None:
    assert not Interval(low=6, high=7).acts(NOISE_RATIO, PROGRESS).any()
    assert Interval(low=5.42, high=7).acts(NOISE_RATIO, PROGRESS).tolist() == [
        False,
        True,
        *[False] * 5,
    ]


def test_a_policy_acts_where_it_evaluates_or_estimates_or_the_network_guides_itself() -> None:
    assert Reuse(every=7).acts(NOISE_RATIO, PROGRESS).all()
    assert Residual().acts(NOISE_RATIO, PROGRESS).all()
    assert Embedded().acts(NOISE_RATIO, PROGRESS).all()
    assert LinearAdaptive(stop=0.5).acts(NOISE_RATIO, PROGRESS).tolist() == [True] * 4 + [False] * 3


def test_a_policy_that_is_fitted_says_by_which_command() -> None:
    """A policy of a package that no command fits can be recognized and refused."""

    class Foreign(LinearAdaptive, frozen=True):
        fitted_by: ClassVar[str | None] = None

    fitted = [kind for kind in POLICIES if kind.fitted]
    assert fitted == [kind for kind in POLICIES if kind.fitted_by is not None]
    assert LinearAdaptive.fitted_by == "linear-ag"
    assert LinearAdaptive(every=3).fit_period == 3
    assert Foreign.fitted
    assert Foreign.fitted_by is None
    with pytest.raises(ValueError, match=r"it needs coefficients of shape \(7, 5\)"):
        Foreign().constants(7, 1)


@each_kind
def test_only_a_policy_that_evaluates_at_every_stage_skips_none(kind: type[Policy]) -> None:
    everywhere = kind.model_validate({}).evaluates(NOISE_RATIO, PROGRESS).all()
    assert kind.skips == (not everywhere or kind.adapts)
