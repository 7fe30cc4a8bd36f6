"""What a branch changes inside the network for its row: plain data, which a model's hooks act on.

Layers are named ``middle`` or by dotted prefixes of the names of a model's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class IdentityAttention:
    """Self-attention that passes each token's own values (PAG, arXiv 2403.17377, section 3.3)."""

    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlurredQueries:
    """Self-attention whose queries are blurred over the picture (SEG, arXiv 2408.00760).

    ``sigma`` is in cells of the attention's own resolution; infinite gives all tokens their mean.
    """

    layers: tuple[str, ...]
    sigma: float


@dataclass(frozen=True, slots=True)
class SkippedBlocks:
    """Transformer blocks that are left out (SLG)."""

    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SkipScales:
    """Factors on a U-Net's skip connections, interpolated from bottom to top (Skip-Tuning)."""

    scales: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BackboneScales:
    """FreeU (arXiv 2309.11497), in the two lowest stages of a U-Net's way up.

    ``backbone`` are factors on half of the channels, ``skips`` on the lowest frequencies of the
    skip connections, each of the lowest stage and of the one above it.
    """

    backbone: tuple[float, float]
    skips: tuple[float, float]


@dataclass(frozen=True, slots=True)
class WeakModel:
    """The row is evaluated by the model's weaker companion (autoguidance)."""


@dataclass(frozen=True, slots=True)
class ApartFrom:
    """Attention whose tokens move away from those of another row that are like them (NegToMe).

    ``reference`` is that row's place in the forward; None is nowhere, and then nothing moves.
    """

    layers: tuple[str, ...]
    strength: float
    threshold: float
    reference: int | None = None


@dataclass(frozen=True, slots=True)
class NormalizedAttention:
    """Cross-attention that is led away from a second text (NAG, arXiv 2505.21179).

    The row attends to that text with the same queries: ``scale Z+ - (scale - 1) Z-``, whose L1 norm
    is at most ``tau`` times that of Z+, goes in with a share of ``alpha``.
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
