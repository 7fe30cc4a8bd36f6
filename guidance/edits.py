"""Changes made inside the network for one row: plain data that a model's hooks act on.

Layers are named ``middle`` or by dotted prefixes of the names of a model's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class IdentityAttention:
    """Self-attention that returns each token's own value (PAG, arXiv 2403.17377, section 3.3)."""

    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlurredQueries:
    """Self-attention whose queries are blurred over the picture (SEG, arXiv 2408.00760).

    ``sigma`` is in cells at the attention's resolution; infinite gives all queries their mean.
    """

    layers: tuple[str, ...]
    sigma: float


@dataclass(frozen=True, slots=True)
class SkippedBlocks:
    """Transformer blocks that are skipped (SLG)."""

    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SkipScales:
    """Factors on a U-Net's skip connections, interpolated from bottom to top (Skip-Tuning)."""

    scales: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BackboneScales:
    """FreeU (arXiv 2309.11497), in the two lowest up-sampling stages of a U-Net.

    ``backbone`` holds factors on half of the channels and ``skips`` factors on the lowest
    frequencies of the skip connections, each for the lowest stage and the one above it.
    """

    backbone: tuple[float, float]
    skips: tuple[float, float]


@dataclass(frozen=True, slots=True)
class WeakModel:
    """Evaluation of the row by the model's weaker companion (autoguidance)."""


@dataclass(frozen=True, slots=True)
class ApartFrom:
    """Attention whose tokens move away from similar tokens of another row (NegToMe).

    ``reference`` is that row's index in the forward pass; if None, nothing moves.
    """

    layers: tuple[str, ...]
    strength: float
    threshold: float
    reference: int | None = None


@dataclass(frozen=True, slots=True)
class NormalizedAttention:
    """Cross-attention that is steered away from a second text (NAG, arXiv 2505.21179).

    The row attends to that text with the same queries, which gives Z-, besides Z+ for its own. The
    extrapolation ``scale Z+ - (scale - 1) Z-``, with its L1 norm limited to ``tau`` times that of
    Z+, is blended in with weight ``alpha``.
    """

    scale: float
    tau: float
    alpha: float


Edit: TypeAlias = (
    IdentityAttention
    | BlurredQueries
    | SkippedBlocks
    | SkipScales
    | BackboneScales
    | WeakModel
    | ApartFrom
    | NormalizedAttention
)
