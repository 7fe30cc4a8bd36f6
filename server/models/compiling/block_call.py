"""Describes how a block of a network is called, for any number of rows; reads no tensor values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import torch

__all__ = ["BlockCall", "Layout", "Operand", "fits", "layout_of", "read", "template_of"]


MAX_PER_ROW = 2
"""Maximum number of entries that a tensor may have for each row of the batch."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument of a block, without its first dimension.

    Attributes:
        size: sizes of the remaining dimensions.
        stride: their strides; 0 for dimensions of size 1, whose stride is meaningless.
        dtype: its data type.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockCall(NamedTuple):
    """One call of a block.

    Attributes:
        key: equal for calls that differ only in tensor values and first dimensions.
        tensors: tensor arguments, in the order of :func:`template_of`.
    """

    key: Hashable
    tensors: list[Tensor]


class Layout(NamedTuple):
    """Sizes of the first dimensions of a call's tensors.

    Attributes:
        fixed: entries of each tensor whose size does not depend on the rows; 0 for the others.
        per_row: entries per row of each tensor that grows with the rows; 0 for the others.
        strides: stride of the first dimension of each tensor.
    """

    fixed: tuple[int, ...]
    per_row: tuple[int, ...]
    strides: tuple[int, ...]

    def lengths(self, rows: int) -> list[int]:
        """Number of entries of each tensor in a call with this many rows."""
        return [one + each * rows for one, each in zip(self.fixed, self.per_row, strict=True)]


def read(args: Sequence[Any], kwargs: Mapping[str, Any]) -> BlockCall | None:
    """Describe a call by its arguments; None if one of them cannot be compared."""
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
    """The arguments of a call, with an :class:`Operand` in place of each tensor."""

    def described(leaf: Any) -> Any:
        return _operand(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(described, (tuple(args), dict(kwargs)))


def layout_of(call: BlockCall) -> Layout | None:
    """Determine which tensors grow with the rows; None if this call leaves it ambiguous.

    The first tensor has one entry per row. Others have one or two: Qwen-Image-Edit's blocks, for
    example, receive the timestep of the latent and that of the reference images. A call is
    ambiguous if it has a single row, or if another dimension is as long as such a tensor.
    """
    rows = len(call.tensors[0])
    counts = [divmod(len(one), rows) for one in call.tensors]
    per_row = tuple(each if not over and 1 <= each <= MAX_PER_ROW else 0 for each, over in counts)
    grown = {rows * each for each in per_row if each}
    if rows == 1 or any(grown.intersection(one.shape[1:]) for one in call.tensors):
        return None
    fixed = tuple(0 if each else len(one) for one, each in zip(call.tensors, per_row, strict=True))
    return Layout(fixed, per_row, tuple(one.stride(0) for one in call.tensors))


def fits(layout: Layout, tensors: Sequence[Tensor], max_rows: int) -> bool:
    """Whether tensors of a call with the same key have this layout and few enough rows."""
    rows = len(tensors[0])
    return rows <= max_rows and all(
        len(one) == length and (length == 1 or one.stride(0) == stride)
        for one, length, stride in zip(tensors, layout.lengths(rows), layout.strides, strict=True)
    )


def _operand(tensor: Tensor) -> Operand:
    size = tuple(tensor.shape[1:])
    strides = zip(size, tensor.stride()[1:], strict=True)
    return Operand(size, tuple(step if many > 1 else 0 for many, step in strides), tensor.dtype)
