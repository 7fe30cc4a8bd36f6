"""What the U-Net of a single-file checkpoint predicts, and on which noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["V_PREDICTION", "ZERO_TERMINAL_SNR", "TrainedPrediction", "prediction_of"]

V_PREDICTION: Final = "v_pred"
ZERO_TERMINAL_SNR: Final = "ztsnr"
"""Tensors by which a checkpoint says how it was trained."""

STATED: Final = ("modelspec.prediction_type", "modelspec.predict_key")
"""Entries of a file's metadata with the same, "epsilon" or "v", as kohya's scripts and ComfyUI
write them."""

SECOND: Final = "v2"
"""Stable Diffusion 2.x, of 512 pixels for noise or of 768 for a velocity; tensors are the same."""

LAST_NORM: Final = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
LEAST_DEVIATION: Final = 0.09
"""Standard deviation of this bias above which ComfyUI takes the U-Net for one of velocities
(``comfy/supported_models.py``, class SD20)."""


class TrainedPrediction(NamedTuple):
    """How a U-Net was trained.

    Attributes:
        velocity: whether it predicts a velocity in place of noise.
        rescaled: whether its schedule ends in noise alone, at a zero terminal SNR.
        guessed: whether this follows from weights, as the file does not say it.
    """

    velocity: bool
    rescaled: bool
    guessed: bool = False

    @property
    def scheduler(self) -> dict[str, Any]:
        """Entries of the scheduler's config."""
        entries: dict[str, Any] = {"prediction_type": "v_prediction"} if self.velocity else {}
        return entries | ({"rescale_betas_zero_snr": True} if self.rescaled else {})


def prediction_of(
    kind: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> TrainedPrediction:
    """What a checkpoint's U-Net predicts.

    Args:
        kind: of the checkpoint, as diffusers names it.
        weights: of the checkpoint.
        metadata: of its file.
    """
    rescaled = ZERO_TERMINAL_SNR in weights
    stated = next((metadata[entry] for entry in STATED if entry in metadata), None)
    if V_PREDICTION in weights or stated == "v":
        return TrainedPrediction(velocity=True, rescaled=rescaled)
    if kind != SECOND or stated == "epsilon":
        return TrainedPrediction(velocity=False, rescaled=rescaled)
    bias = weights.get(LAST_NORM)
    deviates = bias is not None and float(bias.float().std(correction=0)) > LEAST_DEVIATION
    return TrainedPrediction(velocity=deviates, rescaled=rescaled, guessed=True)
