"""What a network is told of prompts: made and read by a model alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, device


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """One prompt, encoded.

    Only the model that made it knows what the tensors are: hidden states, a mask, a pooled vector,
    sizes. The engine keeps it, counts its bytes and hands it back.

    Attributes:
        tensors: by names of the model's own, without a dimension of rows.
        length: tokens that the network attends to.
    """

    tensors: Mapping[str, Tensor]
    length: int

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, eq=False)
class StackedConditioning:
    """Conditioning of the rows of a forward, as the model stacks it.

    Attributes:
        tensors: by names of the model's own, each ``[rows, ...]``; at least one.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def select(self, rows: Tensor) -> StackedConditioning:
        """That of some rows, which may be repeated.

        Args:
            rows: int64 ``[n]`` on the same device, so that choosing needs no wait for it.
        """
        return StackedConditioning(
            {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        )

    def put(self, rows: Tensor, others: StackedConditioning) -> StackedConditioning:
        """The same with some rows replaced.

        Args:
            rows: int64 ``[n]``, which rows.
            others: of the same model and as long, ``n`` rows.
        """
        return StackedConditioning(
            {
                name: tensor.index_copy(0, rows, others.tensors[name])
                for name, tensor in self.tensors.items()
            }
        )
