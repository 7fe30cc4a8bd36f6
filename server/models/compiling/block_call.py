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
        sizes: None of those that have an entry for each row.
        strides: from one entry to the next.
    """

    sizes: tuple[int | None, ...]
    strides: tuple[int, ...]


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
    """Which tensors have an entry for each row; None if this call does not tell.

    The first tensor has. It does not tell of the others if there is one row, or as many rows as
    another dimension has entries.
    """
    rows = len(call.tensors[0])
    if rows == 1 or any(rows in one.shape[1:] for one in call.tensors):
        return None
    sizes = tuple(None if len(one) == rows else len(one) for one in call.tensors)
    return Layout(sizes, tuple(one.stride(0) for one in call.tensors))


def fits(layout: Layout, tensors: Sequence[Tensor], most: int) -> bool:
    """Whether tensors of a call of the same key are laid out so, with at most so many rows."""
    rows = len(tensors[0])
    return rows <= most and all(
        len(one) == (rows if size is None else size) and (len(one) == 1 or one.stride(0) == stride)
        for one, size, stride in zip(tensors, *layout, strict=True)
    )


def _operand(tensor: Tensor) -> Operand:
    size = tuple(tensor.shape[1:])
    strides = zip(size, tensor.stride()[1:], strict=True)
    return Operand(size, tuple(step if many > 1 else 0 for many, step in strides), tensor.dtype)
