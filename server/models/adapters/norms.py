"""Matches changes of the weights and biases of norms in a file to the norms of a model.

LyCORIS writes them with ``train_norm``, and ComfyUI together with changes of other layers. They
have no alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from server.errors import AdapterMismatch
from server.models.adapters.naming import MOVED_BIAS, NORM_BIAS, NORM_WEIGHT, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from server.models.adapters.conversion import TrackedTensor
    from server.models.adapters.target_layer import TargetLayer

__all__ = ["NormChange", "PlacedNorm", "is_norm", "norm_of"]


@dataclass(frozen=True, slots=True, eq=False)
class NormChange:
    """The change of one norm.

    Attributes:
        weight: change of its weight, ``[channels]``, float32; None if it is not changed.
        bias: change of its bias, ``[channels]``, float32; None if it is not changed.
    """

    weight: Tensor | None
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory of its tensors, in bytes."""
        return sum(one.nbytes for one in (self.weight, self.bias) if one is not None)


@dataclass(frozen=True, slots=True)
class PlacedNorm:
    """The change of one norm in a file.

    Attributes:
        weight: ending of the name of the change of its weight, a key of ``naming.ENDINGS``; None if
            it is not changed.
        bias: ending of the name of the change of its bias; None if it is not changed.
        channels: number of channels of the norm.
    """

    weight: str | None
    bias: str | None
    channels: int

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the names of its tensors."""
        return tuple(one for one in (self.weight, self.bias) if one is not None)

    @property
    def nbytes(self) -> int:
        """Memory of the change when loaded, in bytes."""
        return len(self.endings) * self.channels * torch.float32.itemsize

    def loaded(self, own: Mapping[str, Tensor], device: torch.device) -> NormChange:
        """Load the change.

        Args:
            own: tensors of the norm by the endings of their names.
            device: device of the network.
        """
        here = {end: own[end].to(device, torch.float32) for end in self.endings}
        return NormChange(*(None if end is None else here[end] for end in (self.weight, self.bias)))


def is_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm | nn.GroupNorm | nn.RMSNorm]:
    """Whether a module is a norm with a weight, which adapters can change."""
    from diffusers.models.normalization import RMSNorm

    weight: Any = getattr(module, "weight", None)
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | RMSNorm)
    return known and weight is not None and weight.ndim == 1


def norm_of(own: Mapping[str, TrackedTensor], layer: TargetLayer) -> PlacedNorm | None:
    """Find the change of a norm; None if the layer is no norm, or the file does not change it.

    Args:
        own: tensors of the layer by the endings of their names.
        layer: the layer.

    Raises:
        AdapterMismatch: a tensor does not have one number for each channel of the norm.
    """
    moved = NORM_WEIGHT if NORM_WEIGHT in own else None
    bias = next((one for one in (NORM_BIAS, MOVED_BIAS) if one in own), None)
    if len(layer.weight) != 1 or moved == bias:
        return None
    placed = PlacedNorm(moved, bias, *layer.weight)
    for one in (own[ending] for ending in placed.endings):
        if tuple(one.shape) != layer.weight:
            raise AdapterMismatch(
                f"has a change of the shape {list(one.shape)} ({listed(one.sources)}) for "
                f"{layer.description}, a norm of {placed.channels} channels in model "
                f"{layer.model!r}"
            )
    return placed
