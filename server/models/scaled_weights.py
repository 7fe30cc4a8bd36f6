"""Weights in eight-bit floats with a scale for each tensor, as written by ComfyUI.

The scale of ``layer.weight`` is ``layer.scale_weight`` in older files and ``layer.weight_scale`` in
newer ones, in which ``layer.comfy_quant`` contains the format as JSON bytes. Eight-bit floats
without a scale are ordinary numbers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import torch

from server.errors import ModelMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["FORMATS", "unscaled"]

FORMATS: Final = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
SCALES: Final = (".scale_weight", ".weight_scale")
FORMAT: Final = ".comfy_quant"
BITSANDBYTES: Final = ".quant_state.bitsandbytes__"
"""Separates a weight's name from its format, such as ``nf4``, in files written by Forge."""

OF_INPUTS: Final = (".scale_input", ".input_scale")
"""Scales of activations, for products in eight-bit floats, which are not used here."""

MARKER: Final = "scaled_fp8"
"""Tensor of older files that only indicates that others are scaled."""


def unscaled(
    tensors: Mapping[str, Tensor], called: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Multiply tensors that have a scale by it; others are unchanged.

    Args:
        tensors: tensors of a file, by name.
        called: name of the network, for errors.
        dtype: dtype of the products.

    Raises:
        ModelMismatch: a scaled weight has a format other than those in ``FORMATS``.
    """
    made: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(FORMAT):
            _check_format(name, tensor, called)
        elif BITSANDBYTES in name:
            raise _unsupported(name, name.rpartition(BITSANDBYTES)[2], called)
        elif name.endswith(SCALES):
            scales[f"{name.rpartition('.')[0]}.weight"] = tensor
        elif not name.endswith(OF_INPUTS) and name.rpartition(".")[2] != MARKER:
            made[name] = tensor
    for name, scale in scales.items():
        weight = made.get(name)
        if weight is None or weight.dtype not in FORMATS.values() or not _fits(weight, scale):
            kind = "missing" if weight is None else str(weight.dtype).removeprefix("torch.")
            raise ModelMismatch(
                f"{called} has a scale of shape {list(scale.shape)} for {name}, which is {kind}; "
                f"scaled weights must be {' or '.join(FORMATS)} with one scale, or one for each "
                "output."
            )
        by_output = scale.float().reshape(-1, *(1,) * (weight.ndim - 1))
        made[name] = (weight.float() * by_output).to(dtype)
    return made


def _fits(weight: Tensor, scale: Tensor) -> bool:
    return weight.ndim > 0 and scale.numel() in (1, len(weight))


def _check_format(name: str, tensor: Tensor, called: str) -> None:
    try:
        said = json.loads(bytes(tensor.to(torch.uint8).flatten().tolist()))
        kind = said.get("format")
    except (ValueError, AttributeError, RecursionError):
        kind = None
    if kind not in FORMATS:
        raise _unsupported(name, str(kind), called)


def _unsupported(name: str, kind: str, called: str) -> ModelMismatch:
    return ModelMismatch(
        f"{called} has weights in the format {kind[:40]!r} ({name}); allowed are "
        f"{', '.join(FORMATS)}."
    )
