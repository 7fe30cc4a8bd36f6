"""The scalars that convert a network's output to the denoised prediction."""

from typing import get_args

import numpy as np
import pytest

from samplers import NoiseSchedule, PredictionType, preconditioning
from samplers.prediction import as_velocity
from tests.samplers.cases import DISCRETE, EDM, FLOW

CLEAN, NOISE = np.array([0.4, -1.1, 2.0]), np.array([0.9, 0.1, -1.7])


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        ("epsilon", DISCRETE),
        ("v_prediction", DISCRETE),
        ("sample", DISCRETE),
        ("flow", FLOW),
    ],
)
def test_a_perfect_network_gives_the_clean_picture(
    prediction: PredictionType, schedule: NoiseSchedule
) -> None:
    alpha, sigma = schedule.level(np.array([0.3, 0.5, 0.9]) * schedule.t_start)
    x = alpha * CLEAN + sigma * NOISE
    raw = {
        "epsilon": NOISE,
        "v_prediction": alpha * NOISE - sigma * CLEAN,
        "sample": CLEAN,
        "flow": NOISE - CLEAN,
    }[prediction]
    scale_in, skip, out = preconditioning(prediction, alpha, sigma)
    np.testing.assert_allclose(skip * x + out * raw, CLEAN, rtol=1e-9)
    assert (scale_in == 1).all()


def test_edm_is_table_1_of_karras() -> None:
    sigma = np.array([0.01, 0.5, 40.0])
    alpha, _ = EDM.level(sigma)
    scale_in, skip, out = preconditioning("edm", alpha, sigma, sigma_data=0.5)
    # The three are defined by unit variance of inputs and of training targets (appendix B.6).
    np.testing.assert_allclose(scale_in**2 * (0.25 + sigma**2), 1)
    target_variance = ((1 - skip) ** 2 * 0.25 + skip**2 * sigma**2) / out**2
    np.testing.assert_allclose(target_variance, 1)
    # Minimal amplification of the network's errors.
    np.testing.assert_allclose(skip, 0.25 / (0.25 + sigma**2))


@pytest.mark.parametrize("prediction", get_args(PredictionType))
def test_the_predictions_of_any_network_are_those_of_one_of_the_velocity(
    prediction: PredictionType,
) -> None:
    schedule = {"flow": FLOW, "edm": EDM}.get(prediction, DISCRETE)
    alpha, sigma = schedule.level(np.array([0.3, 0.5, 0.9]) * schedule.t_start)
    scale, skip, out = as_velocity(prediction, alpha, sigma)
    x = alpha * CLEAN + sigma * NOISE
    velocity = NOISE - CLEAN
    if prediction != "flow":
        velocity = scale * (alpha * NOISE - sigma * CLEAN)
        np.testing.assert_allclose(scale**2 * (alpha**2 + sigma**2), 1)
    np.testing.assert_allclose(skip * x + out * velocity, CLEAN, rtol=1e-9)


def test_an_unknown_prediction_is_refused_by_name() -> None:
    one = np.ones(1)
    with pytest.raises(ValueError, match="prediction_type is 'score'; allowed are epsilon, v_pred"):
        preconditioning("score", one, one)  # pyright: ignore[reportArgumentType]
