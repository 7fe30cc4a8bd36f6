"""How a block of a network is called, whatever the number of rows: pure, touches no values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import torch

__all__ = ["BlockCall", "Layout", "Operand", "fits", "layout_of", "read", "template_of"]


MOST_PER_ROW = 2
"""Entries of a tensor for each row."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a block is given, without its first dimension.

    Attributes:
        size: of the further dimensions.
        stride: likewise; 0 where the size is 1, as it means nothing there.
        dtype: of its numbers.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockCall(NamedTuple):
    """One call of a block.

    Attributes:
        key: equal for calls that differ in values and in first dimensions alone.
        tensors: that are given, in the order of :func:`template_of`.
    """

    key: Hashable
    tensors: list[Tensor]


class Layout(NamedTuple):
    """First dimensions of the tensors of a call.

    Attributes:
        fixed: entries of each tensor that does not grow with the rows; 0 of the others.
        per_row: entries for each row; 0 of tensors that do not grow.
        strides: from one entry to the next.
    """

    fixed: tuple[int, ...]
    per_row: tuple[int, ...]
    strides: tuple[int, ...]

    def lengths(self, rows: int) -> list[int]:
        """Entries of each tensor in a call of so many rows."""
        return [one + each * rows for one, each in zip(self.fixed, self.per_row, strict=True)]


def read(args: Sequence[Any], kwargs: Mapping[str, Any]) -> BlockCall | None:
    """A call by what it is given; None if there is something that cannot be compared."""
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors: list[Tensor] = []
    known: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not leaf.ndim:
                return None
            tensors.append(leaf)
            known.append(_operand(leaf))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            known.append((type(leaf), leaf))
        else:
            return None
    return BlockCall((structure, tuple(known)), tensors) if tensors else None


def template_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call is given, with an :class:`Operand` in the place of each tensor."""

    def described(leaf: Any) -> Any:
        return _operand(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(described, (tuple(args), dict(kwargs)))


def layout_of(call: BlockCall) -> Layout | None:
    """Which tensors have entries for each row; None if this call does not tell.

    The first tensor has one. Others have one or two, as Qwen-Image-Edit's blocks are told of the
    time of the latent and of that of the pictures. A call does not tell if there is one row, or if
    another dimension has as many entries as such a tensor.
    """
    rows = len(call.tensors[0])
    counts = [divmod(len(one), rows) for one in call.tensors]
    per_row = tuple(each if not over and 1 <= each <= MOST_PER_ROW else 0 for each, over in counts)
    grown = {rows * each for each in per_row if each}
    if rows == 1 or any(grown.intersection(one.shape[1:]) for one in call.tensors):
        return None
    fixed = tuple(0 if each else len(one) for one, each in zip(call.tensors, per_row, strict=True))
    return Layout(fixed, per_row, tuple(one.stride(0) for one in call.tensors))


def fits(layout: Layout, tensors: Sequence[Tensor], most: int) -> bool:
    """Whether tensors of a call of the same key are laid out so, with at most so many rows."""
    rows = len(tensors[0])
    return rows <= most and all(
        len(one) == length and (length == 1 or one.stride(0) == stride)
        for one, length, stride in zip(tensors, layout.lengths(rows), layout.strides, strict=True)
    )


def _operand(tensor: Tensor) -> Operand:
    size = tuple(tensor.shape[1:])
    strides = zip(size, tensor.stride()[1:], strict=True)
    return Operand(size, tuple(step if many > 1 else 0 for many, step in strides), tensor.dtype)
