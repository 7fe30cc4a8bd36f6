"""Loaded adapters: changes of a network's layers and norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from server.models.adapters.magnitude import Magnitude
    from server.models.adapters.norms import NormChange

__all__ = ["Adapter", "LowRank", "RowAdapters", "Weighted"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change of one layer: ``up @ down`` of its input is added to its output.

    Attributes:
        down: ``[rank, in]``; for a convolution ``[rank, in, height, width]``.
        up: ``[out, rank]``, multiplied by alpha / rank.
        magnitude: magnitudes of the changed weight, for a DoRA; None for any other adapter.
        bias: change of the layer's bias, ``[out]``, float32; None where it is not changed.
    """

    down: Tensor
    up: Tensor
    magnitude: Magnitude | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """Memory of its tensors, in bytes."""
        others = (one.nbytes for one in (self.magnitude, self.bias) if one is not None)
        return self.down.nbytes + self.up.nbytes + sum(others)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """A LoRA, loaded for one model.

    Attributes:
        name: name that requests use.
        revision: first 16 hexadecimal digits of the SHA-256 of its file.
        parts: changes by the network's name in a model folder (``unet``, ``text_encoder``, ...) and
            by the layer's name in that network.
        norms: changes of norms, by the names of network and norm.
    """

    name: str
    revision: str
    parts: Mapping[str, Mapping[str, LowRank]]
    norms: Mapping[str, Mapping[str, NormChange]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        parts = (*self.parts.values(), *self.norms.values())
        return sum(change.nbytes for part in parts for change in part.values())

    @property
    def changes_text(self) -> bool:
        """Whether it changes how prompts are encoded."""
        return any(part.startswith("text_encoder") for part in (*self.parts, *self.norms))


@dataclass(frozen=True, slots=True)
class Weighted:
    """An adapter and the factor on all of its changes."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True)
class RowAdapters:
    """The adapters of the rows of a forward pass.

    Attributes:
        rows: adapters of each row, in order. The changes of several are added up.
        fixed: whether changes are computed over as many rows as the forward pass has, so that
            their bits do not depend on how many rows have adapters.
        kept: what a network has prepared from them and reads instead, see
            ``AdaptedNetwork.kept_for``; None where nothing has been prepared.
    """

    rows: tuple[tuple[Weighted, ...], ...]
    fixed: bool = False
    kept: object | None = None

    def __bool__(self) -> bool:
        """Whether any row has an adapter."""
        return self.kept is not None or any(self.rows)

    def of(self, rows: Sequence[int]) -> RowAdapters:
        """Select some rows, which may be repeated."""
        return RowAdapters(tuple(self.rows[row] for row in rows), self.fixed)

    def padded(self, count: int, *, fixed: bool) -> RowAdapters:
        """Append rows until there are ``count``.

        Args:
            count: number of rows.
            fixed: whether appended rows have no adapters. Otherwise they have those of the last
                row, so that there are fewer combinations, and rows of one adapter stay one run.
        """
        last = () if fixed else self.rows[-1]
        return RowAdapters((*self.rows, *(last,) * (count - len(self.rows))), fixed=fixed)
