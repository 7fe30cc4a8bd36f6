"""Conversion of a network's raw output to the denoised prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from samplers.levels import F64

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]


class Preconditioning(NamedTuple):
    """Scalars of ``denoised = skip * x + out * network(scale_in * x)``, of the shape of alpha."""

    scale_in: F64
    skip: F64
    out: F64


def preconditioning(
    prediction: PredictionType, alpha: F64, sigma: F64, sigma_data: float = 0.5
) -> Preconditioning:
    """The scalars that turn a raw output into the denoised prediction.

    Args:
        prediction: what the network predicts; ``v_prediction`` needs alpha^2 + sigma^2 = 1
            (arXiv 2202.00512, appendix D), ``flow`` needs alpha + sigma = 1, ``edm`` is the
            preconditioned network of arXiv 2206.00364, table 1, at alpha = 1.
        alpha: signal scale, any shape.
        sigma: noise scale, same shape.
        sigma_data: standard deviation of the data, for ``edm`` only.

    Raises:
        ValueError: the prediction type is unknown.
    """
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    match prediction:
        case "epsilon":
            return Preconditioning(one, 1 / alpha, -sigma / alpha)
        case "v_prediction":
            return Preconditioning(one, alpha, -sigma)
        case "sample":
            return Preconditioning(one, zero, one)
        case "flow":
            return Preconditioning(one, one, -sigma)
        case "edm":
            total = sigma**2 + sigma_data**2
            return Preconditioning(
                total**-0.5, sigma_data**2 / total, sigma * sigma_data * total**-0.5
            )
    raise ValueError(
        f"prediction_type is {prediction!r}; allowed are epsilon, v_prediction, sample, flow, edm."
    )


def as_velocity(prediction: PredictionType, alpha: F64, sigma: F64) -> Preconditioning:
    """The scalars of an equivalent network that predicts the velocity.

    Networks of ``flow`` and ``v_prediction`` do so themselves. The predictions of any other network
    equal those of a ``v_prediction`` network at x scaled to ``alpha^2 + sigma^2 = 1``, whose output
    is ``(denoised - skip * x) / out``.

    Args:
        prediction: what the network predicts.
        alpha: signal scale, any shape.
        sigma: noise scale above 0, same shape.
    """
    if prediction in ("flow", "v_prediction"):
        return preconditioning(prediction, alpha, sigma)
    scale = 1 / np.hypot(alpha, sigma)
    own = preconditioning("v_prediction", alpha * scale, sigma * scale)
    return Preconditioning(scale, own.skip * scale, own.out)
