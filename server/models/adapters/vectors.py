"""Matches vectors of a file to layers: magnitudes of DoRA, and changes of biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import AdapterMismatch
from server.models.adapters.magnitude import INPUTS, OUTPUTS
from server.models.adapters.naming import FACTOR_BIAS, MOVED_BIAS, SIZE, SIZE_BLENDED, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from server.models.adapters.conversion import TrackedTensor
    from server.models.adapters.magnitude import Axis
    from server.models.adapters.target_layer import TargetLayer

__all__ = ["PlacedBias", "PlacedMagnitude", "bias_of", "magnitude_of"]


@dataclass(frozen=True, slots=True)
class PlacedMagnitude:
    """The magnitudes that a DoRA sets for a layer.

    Attributes:
        ending: ending of the tensor's name, a key of ``naming.ENDINGS``.
        source: name of the tensor in the file, which several layers share if they are fused there.
        axis: whether outputs or inputs have magnitudes.
        blended: see ``magnitude.Magnitude``.
    """

    ending: str
    source: str
    axis: Axis
    blended: bool


@dataclass(frozen=True, slots=True)
class PlacedBias:
    """The change of a layer's bias.

    Attributes:
        ending: ending of the tensor's name, a key of ``naming.ENDINGS``.
        scale: factor on the tensor.
    """

    ending: str
    scale: float


def magnitude_of(own: Mapping[str, TrackedTensor], layer: TargetLayer) -> PlacedMagnitude | None:
    """Find the magnitudes of a layer; None if the file has none.

    Args:
        own: tensors of the layer by the endings of their names.
        layer: the layer.

    Raises:
        AdapterMismatch: there is not one magnitude for each output or input of the layer.
    """
    ending = next((one for one in (SIZE_BLENDED, SIZE) if one in own), None)
    if ending is None:
        return None
    out, features, *kernel = layer.weight
    ones = (1,) * len(kernel)
    axes: dict[tuple[int, ...], Axis] = {(1, features, *ones): INPUTS, (out, 1, *ones): OUTPUTS}
    if ending == SIZE:
        axes = {(out,): OUTPUTS, (1, out, *ones): OUTPUTS}
    size, [source] = tuple(own[ending].shape), own[ending].sources
    if size not in axes:
        raise AdapterMismatch(
            f"has sizes of the shape {list(size)} ({listed([source])}) for {layer.description}, "
            f"whose weight has the shape {list(layer.weight)} in model {layer.model!r}"
        )
    return PlacedMagnitude(ending, source, axes[size], blended=ending == SIZE_BLENDED)


def bias_of(
    own: Mapping[str, TrackedTensor], layer: TargetLayer, *, scale: float
) -> PlacedBias | None:
    """Find the change of a layer's bias; None if the file has none.

    Args:
        own: tensors of the layer by the endings of their names.
        layer: the layer.
        scale: alpha / rank, which also multiplies peft's change of a bias.

    Raises:
        AdapterMismatch: there is not one change for each output of the layer.
    """
    ending = next((one for one in (MOVED_BIAS, FACTOR_BIAS) if one in own), None)
    if ending is None:
        return None
    size = tuple(own[ending].shape)
    if size != layer.weight[:1]:
        raise AdapterMismatch(
            f"has a change of a bias of the shape {list(size)} ({listed(own[ending].sources)}) for "
            f"{layer.description}, which has {layer.weight[0]} outputs in model {layer.model!r}"
        )
    return PlacedBias(ending, 1.0 if ending == MOVED_BIAS else scale)
