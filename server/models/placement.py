"""Where the networks of a loaded model are kept, and how many bits their weights have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from server.errors import ModelMismatch
from server.models.folder import AUTOENCODER
from server.models.quantization import Quantization

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch


__all__ = ["Offload", "Placement", "first_that_fits", "options"]

Offload: TypeAlias = Literal["none", "text", "all"]
"""Networks whose blocks are kept in host memory and streamed to the device as they run: none, the
text encoders, or the denoiser as well."""

LEVELS: Final[Sequence[Offload]] = ("none", "text", "all")

TEXT: Final = "text_encoder"
"""Prefix of text encoders' names in a model folder."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a model is kept in memory.

    Attributes:
        quantization: quantization of its denoiser and its text encoders.
        offload: networks that are streamed from host memory.
    """

    quantization: Quantization = "none"
    offload: Offload = "none"

    def quantizes(self, part: str) -> bool:
        """Whether a network, by its name in a model folder, is quantized."""
        return self.quantization != "none" and part != AUTOENCODER

    def streams(self, part: str) -> bool:
        """Whether a network, by its name in a model folder, is streamed."""
        if part.startswith(TEXT):
            return self.offload != "none"
        return self.offload == "all" and part != AUTOENCODER


def options(
    offload: Literal["auto", "none", "text", "all"],
    quantization: Quantization,
    device: torch.device,
) -> tuple[Placement, ...]:
    """The possible placements of a model, starting with the least use of host memory.

    Args:
        offload: the operator's choice.
        quantization: the operator's choice.
        device: device of the model.

    Raises:
        ModelMismatch: the choices are incompatible with each other or with the device.
    """
    if device.type == "cpu" and offload in ("text", "all"):
        raise ModelMismatch(
            f"offload is {offload!r}, but the device is a CPU, whose memory is the host's own; use "
            "auto or none."
        )
    if quantization == "nf4" and offload in ("text", "all"):
        raise ModelMismatch(
            f"offload is {offload!r} and quantize is 'nf4', whose weights cannot be streamed; use "
            "int8 or fp8, or offload none."
        )
    as_it_is = Placement(quantization)
    if device.type == "cpu" or quantization == "nf4":
        return (as_it_is,)
    levels = LEVELS if offload == "auto" else (offload,)
    return tuple(replace(as_it_is, offload=level) for level in levels)


def first_that_fits(
    placements: Sequence[Placement], needs: Callable[[Placement], int], max_bytes: int
) -> Placement:
    """The first placement that fits; the last one if none does.

    Args:
        placements: placements in order of preference, at least one.
        needs: bytes of device memory that the model takes with a placement.
        max_bytes: maximum number of bytes that it may take.
    """
    return next((one for one in placements if needs(one) <= max_bytes), placements[-1])
