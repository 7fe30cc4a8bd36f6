"""Blends of several prompts: weighted mixtures of their conditioning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from server.errors import InvalidRequest
from server.models.conditioning import Conditioning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["Blend", "BlendKind", "TextPrompt", "conditioning_of", "texts_of"]

BlendKind: TypeAlias = Literal["linear", "spherical"]

PARALLEL = 0.9995
"""Cosine of two vectors above which their arc is a straight line to float32 precision."""


@dataclass(frozen=True, slots=True)
class Blend:
    """A mixture of prompts.

    Attributes:
        parts: prompts or blends, each with its weight, at least 0; at least one weight is above 0.
        kind: ``linear`` is the weighted mean. ``spherical`` moves from part to part along the arc
            between their vectors, token by token, so that a mixture has the norm of its parts; with
            more than two parts it depends on their order.
    """

    parts: tuple[tuple[TextPrompt, float], ...]
    kind: BlendKind = "linear"


TextPrompt: TypeAlias = "str | Blend | None"
"""What a network is conditioned on: a prompt, a blend, or None for the model's unconditional."""


def texts_of(prompt: TextPrompt) -> tuple[str | None, ...]:
    """The prompts that must be encoded for it, in order, each once."""
    if not isinstance(prompt, Blend):
        return (prompt,)
    texts = (text for part, _ in prompt.parts for text in texts_of(part))
    return tuple(dict.fromkeys(texts))


def conditioning_of(prompt: TextPrompt, encoded: Mapping[str | None, Conditioning]) -> Conditioning:
    """The conditioning of a prompt, or of a blend of prompts.

    Args:
        prompt: prompt, blend or None.
        encoded: conditioning of each of its prompts.

    Raises:
        InvalidRequest: the model encodes the prompts to different shapes, which cannot be mixed.
    """
    if not isinstance(prompt, Blend):
        return encoded[prompt]
    weighted = [(part, weight) for part, weight in prompt.parts if weight > 0]
    parts = [conditioning_of(part, encoded) for part, _ in weighted]
    weights = [weight for _, weight in weighted]
    mix = _mean if prompt.kind == "linear" else _along_arcs
    return Conditioning(
        {
            name: _mixed(mix, [part.tensors[name] for part in parts], weights)
            for name in parts[0].tensors
        },
        max(part.length for part in parts),
    )


def _mixed(
    mix: Callable[[Sequence[Tensor], Sequence[float]], Tensor],
    tensors: Sequence[Tensor],
    weights: Sequence[float],
) -> Tensor:
    first = tensors[0]
    if all(one is other or torch.equal(one, other) for one, other in pairwise(tensors)):
        return first
    alike = all(one.shape == first.shape for one in tensors)
    if not (alike and first.is_floating_point()):
        raise InvalidRequest(
            "prompt",
            "prompt is a blend, but this model encodes its texts to different lengths; use texts "
            "of the same number of tokens, or one at a time.",
        )
    return mix([one.float() for one in tensors], weights).to(first.dtype)


def _mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum(weights)
    return torch.stack([w / total * one for one, w in zip(vectors, weights, strict=True)]).sum(0)


def _along_arcs(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mixed, so_far = vectors[0], weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        so_far += weight
        mixed = _slerp(mixed, vector, weight / so_far)
    return mixed


def _slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation between vectors of the last dimension (Shoemake 1985)."""
    cosine = torch.cosine_similarity(start, end, dim=-1)[..., None]
    # The arc between opposite vectors is undefined: the clamp keeps the division finite.
    angle = cosine.clamp(-PARALLEL, PARALLEL).acos()
    along = (start * ((1 - share) * angle).sin() + end * (share * angle).sin()) / angle.sin()
    return along.where(cosine.abs() < PARALLEL, start.lerp(end, share))
