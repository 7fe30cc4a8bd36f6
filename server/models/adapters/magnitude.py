"""Magnitudes of a layer's outputs or inputs, which a DoRA has in addition to its factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INPUTS", "OUTPUTS", "Axis", "Magnitude"]

Axis = Literal[0, 1]
"""Dimension of a weight: 0 for outputs, 1 for inputs."""

OUTPUTS: Axis = 0
INPUTS: Axis = 1

MIN_NORM = torch.finfo(torch.float32).eps
"""Lower bound of norms, which LyCORIS uses as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Magnitude:
    """The magnitudes that an adapter gives to the outputs or inputs of a layer.

    Attributes:
        size: m; ``[out]`` or ``[in]``, float32.
        norms: ``||W||^2``, ``<W, BA>`` and ``||BA||^2`` of each output or input, ``[3, out]`` or
            ``[3, in]``, float32.
        axis: whether outputs or inputs have magnitudes.
        blended: meaning of a factor w on the adapter. If true, w times the whole change of the
            weight is added, as in ComfyUI; otherwise w is a factor on BA only, as in peft.
    """

    size: Tensor
    norms: Tensor
    axis: Axis
    blended: bool

    @property
    def nbytes(self) -> int:
        """Memory of both tensors, in bytes."""
        return self.size.nbytes + self.norms.nbytes

    def scale(self, weight: float) -> Tensor:
        """``m / ||W + w BA||``.

        Args:
            weight: w.
        """
        whole, mixed, own = self.norms
        squared = whole + 2 * weight * mixed + weight**2 * own
        return self.size / squared.clamp_min(MIN_NORM**2).sqrt()
