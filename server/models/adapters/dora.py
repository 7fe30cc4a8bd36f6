"""DoRA: magnitudes of the outputs, or the inputs, of a layer's changed weight.

Such an adapter has a magnitude vector m in addition to its factors, and the changed weight is
``m * (W + BA) / ||W + BA||``, with the norms of the rows or the columns of the matrix. Its change
therefore depends on the model's own weights, of which three numbers are kept for each row or
column: they determine the norm for any factor w on BA.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5. In peft the
norms are those of each output's weights; LyCORIS and OneTrainer also support those of each input's.

Departure from programs that add changes to the weights one after another: with several adapters,
each norm is that of the model's own weights with a single adapter, as in peft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from server.models.adapters.magnitude import INPUTS, OUTPUTS, Magnitude
from server.models.gguf.layers import BlockConv2d, BlockLinear

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.models.adapters.adapter import LowRank
    from server.models.adapters.magnitude import Axis
    from server.models.adapters.stack import Changes, Layer

__all__ = ["WeightScales", "composed", "joined", "measured", "weight_of"]

FAR_ABOVE_BIAS = 2.0**8

ENTRIES = 2**22
"""Number of elements of a weight that are compared at once, and of the identity that are multiplied
at once."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightScales:
    """Factors on a layer's own weight for one row (None for 1), and the change of its bias.

    Attributes:
        outputs: ``[out]``, float32.
        inputs: ``[in]``, float32.
        bias: ``[out]``, float32; None for no change.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    bias: Tensor | None = None


def measured(
    size: Tensor, axis: Axis, change: LowRank, weight: Tensor, *, blended: bool
) -> Magnitude:
    """Measure the norms of a weight and of its change.

    Args:
        size: m, of any shape with one entry per output or input.
        axis: whether outputs or inputs have magnitudes.
        change: BA, for a factor of 1.
        weight: W, ``[out, in]`` or ``[out, in, height, width]``, on any device.
        blended: see :class:`Magnitude`.
    """
    inputs, down = weight.shape[1], change.down.flatten(1).float()
    most = max(1, ENTRIES // down.shape[1])
    norms: list[Tensor] = []
    for whole, up in zip(weight.split(most), change.up.split(most), strict=True):
        own = up.float() @ down
        whole = whole.to(own.device, torch.float32).flatten(1)
        products = torch.stack([whole.square(), whole * own, own.square()])
        if axis == OUTPUTS:
            norms.append(products.sum(2))
        else:
            norms.append(products.unflatten(2, (inputs, -1)).sum((1, 3)))
    found = torch.cat(norms, 1) if axis == OUTPUTS else torch.stack(norms).sum(0)
    return Magnitude(size.to(found.device, torch.float32).flatten(), found, axis, blended)


def joined(parts: Iterable[Magnitude]) -> list[Magnitude]:
    """Replace the norms of inputs by those of the fused layer that some layers were trained as.

    Args:
        parts: magnitudes of the inputs of each layer, with the norms of its own weight.
    """
    parts = [*parts]
    norms = torch.stack([one.norms for one in parts]).sum(0)
    return [replace(one, norms=norms) for one in parts]


def composed(changes: Changes) -> tuple[WeightScales, Changes]:
    """Express all changes of a layer in one row as factors on its weight and low-rank changes.

    They are applied one after another, as in peft: a magnitude scales the result of the changes
    before it.

    Args:
        changes: changes with their weights, in the order of the request.

    Returns:
        The factors, and the changes without magnitudes and biases of their own.
    """
    made: Changes = []
    scales: dict[Axis, Tensor] = {}
    bias: Tensor | None = None
    for whole_change, weight in changes:
        change, magnitude = whole_change, whole_change.magnitude
        if change.bias is not None:
            bias = weight * change.bias if bias is None else bias + weight * change.bias
            change = replace(change, bias=None)
        if magnitude is None:
            made.append((change, weight))
            continue
        axis = magnitude.axis
        own = magnitude.scale(1.0 if magnitude.blended else weight)
        whole = 1 + weight * (own - 1) if magnitude.blended else own
        made = [(_scaled(one, whole, axis), factor) for one, factor in made]
        made.append((_scaled(change, own, axis), weight))
        scales[axis] = scales[axis] * whole if axis in scales else whole
    return WeightScales(scales.get(OUTPUTS), scales.get(INPUTS), bias), made


def weight_of(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The weight of a layer, dequantized if necessary.

    Args:
        layer: a layer of a network.
        dtype: dtype of its computations.
    """
    if isinstance(layer, BlockLinear | BlockConv2d):
        return layer.restored()
    weight, bias = layer.weight.data, dict(layer.named_parameters()).get("bias")
    is_whole = type(weight) is torch.Tensor and weight.is_floating_point()
    if isinstance(layer, nn.Conv2d) or is_whole:
        return weight
    # Scaled up, so that the weight does not round away next to the bias.
    size = 1.0 if bias is None else FAR_ABOVE_BIAS
    inputs = layer.in_features
    rows = min(inputs, max(1, ENTRIES // inputs))
    restored = torch.empty(inputs, layer.out_features, dtype=dtype, device=weight.device)
    # The layer's output for the identity, in whatever format its weight is stored. Some rows at a
    # time, as all of them may be larger than the weight. The last batch overlaps, so that all
    # batches have the same shape.
    for first in (min(row, inputs - rows) for row in range(0, inputs, rows)):
        some = torch.zeros(rows, inputs, dtype=dtype, device=weight.device)
        some[:, first:].fill_diagonal_(size)
        # ``forward`` is called directly, as a concurrent forward pass may have hooks on the layer.
        made = layer.forward(some)
        restored[first : first + rows] = made if bias is None else (made - bias) / size
    return restored.mT


def _scaled(change: LowRank, scale: Tensor, axis: Axis) -> LowRank:
    """Multiply the rows or the columns of a change's product by factors, in float32."""
    if axis == OUTPUTS:
        up = (change.up.float() * scale[:, None]).to(change.up.dtype)
        return replace(change, up=up, magnitude=None)
    broadcast = scale.view(1, -1, *[1] * (change.down.ndim - 2))
    down = (change.down.float() * broadcast).to(change.down.dtype)
    return replace(change, down=down, magnitude=None)
