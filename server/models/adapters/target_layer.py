"""A layer of a model to which tensors of an adapter's file are matched."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TargetLayer"]


@dataclass(frozen=True, slots=True)
class TargetLayer:
    """A layer of a model to which tensors of an adapter's file are matched.

    An ``AdapterMismatch`` of its tensors has a message that continues a sentence which begins with
    the adapter's name.

    Attributes:
        description: what messages call the layer.
        weight: shape of its weight.
        model: name of the model.
    """

    description: str
    weight: tuple[int, ...]
    model: str
