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


def magnitude_of(
    own: Mapping[str, TrackedTensor], where: str, weight: tuple[int, ...], model: str
) -> PlacedMagnitude | None:
    """Find the magnitudes of a layer; None if the file has none.

    Args:
        own: tensors of the layer by the endings of their names.
        where: description of the layer for error messages.
        weight: shape of its weight.
        model: name of the model.

    Raises:
        AdapterMismatch: they do not fit the layer; the message continues a sentence that begins
            with the adapter's name.
    """
    ending = next((one for one in (SIZE_BLENDED, SIZE) if one in own), None)
    if ending is None:
        return None
    out, features, *kernel = weight
    ones = (1,) * len(kernel)
    axes: dict[tuple[int, ...], Axis] = {(1, features, *ones): INPUTS, (out, 1, *ones): OUTPUTS}
    if ending == SIZE:
        axes = {(out,): OUTPUTS, (1, out, *ones): OUTPUTS}
    size, [source] = tuple(own[ending].shape), own[ending].sources
    if size not in axes:
        raise AdapterMismatch(
            f"has sizes of the shape {list(size)} ({listed([source])}) for {where}, whose weight "
            f"has the shape {list(weight)} in model {model!r}"
        )
    return PlacedMagnitude(ending, source, axes[size], blended=ending == SIZE_BLENDED)


def bias_of(
    own: Mapping[str, TrackedTensor],
    where: str,
    weight: tuple[int, ...],
    model: str,
    *,
    scale: float,
) -> PlacedBias | None:
    """Find the change of a layer's bias; None if the file has none.

    Args:
        own: tensors of the layer by the endings of their names.
        where: description of the layer for error messages.
        weight: shape of its weight.
        model: name of the model.
        scale: alpha / rank, which also multiplies peft's change of a bias.

    Raises:
        AdapterMismatch: it does not fit the layer; the message continues a sentence that begins
            with the adapter's name.
    """
    ending = next((one for one in (MOVED_BIAS, FACTOR_BIAS) if one in own), None)
    if ending is None:
        return None
    size = tuple(own[ending].shape)
    if size != weight[:1]:
        raise AdapterMismatch(
            f"has a change of a bias of the shape {list(size)} ({listed(own[ending].sources)}) for "
            f"{where}, which has {weight[0]} outputs in model {model!r}"
        )
    return PlacedBias(ending, 1.0 if ending == MOVED_BIAS else scale)
