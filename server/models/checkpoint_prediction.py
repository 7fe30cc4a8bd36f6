"""Determines what the U-Net of a single-file checkpoint predicts, and its noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["V_PREDICTION", "ZERO_TERMINAL_SNR", "TrainedPrediction", "prediction_of"]

V_PREDICTION: Final = "v_pred"
ZERO_TERMINAL_SNR: Final = "ztsnr"
"""Marker tensors by which a checkpoint states how it was trained."""

STATED: Final = ("modelspec.prediction_type", "modelspec.predict_key")
"""Entries of a file's metadata that state the same, "epsilon" or "v", as written by kohya's scripts
and ComfyUI."""

SECOND: Final = "v2"
"""Stable Diffusion 2.x. Models of 512 pixels predict noise, those of 768 a velocity; their tensors
have the same names and shapes."""

LAST_NORM: Final = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
MIN_DEVIATION: Final = 0.09
"""Standard deviation of this bias above which ComfyUI assumes that the U-Net predicts a velocity
(``comfy/supported_models.py``, class SD20)."""


class TrainedPrediction(NamedTuple):
    """How a U-Net was trained.

    Attributes:
        velocity: whether it predicts a velocity instead of noise.
        rescaled: whether its schedule is rescaled to zero terminal SNR, i.e. ends in pure noise.
        guessed: whether this is inferred from weights because the file does not state it.
    """

    velocity: bool
    rescaled: bool
    guessed: bool = False

    @property
    def scheduler(self) -> dict[str, Any]:
        """Entries for the scheduler's config."""
        entries: dict[str, Any] = {"prediction_type": "v_prediction"} if self.velocity else {}
        return entries | ({"rescale_betas_zero_snr": True} if self.rescaled else {})


def prediction_of(
    kind: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> TrainedPrediction:
    """Determine what a checkpoint's U-Net predicts.

    Args:
        kind: kind of the checkpoint by diffusers' name.
        weights: tensors of the checkpoint.
        metadata: metadata of its file.
    """
    rescaled = ZERO_TERMINAL_SNR in weights
    stated = next((metadata[entry] for entry in STATED if entry in metadata), None)
    if V_PREDICTION in weights or stated == "v":
        return TrainedPrediction(velocity=True, rescaled=rescaled)
    if kind != SECOND or stated == "epsilon":
        return TrainedPrediction(velocity=False, rescaled=rescaled)
    bias = weights.get(LAST_NORM)
    deviates = bias is not None and float(bias.float().std(correction=0)) > MIN_DEVIATION
    return TrainedPrediction(velocity=deviates, rescaled=rescaled, guessed=True)
