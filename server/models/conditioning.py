"""Conditioning of a network on prompts; only the model that made it knows what the tensors mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor, device

MASK = "mask"
"""Name of the attention mask in stacked conditioning, bool ``[rows, places]``."""

LENGTHS = "lengths"
"""Name of the text lengths in stacked conditioning, in tokens, int64 ``[rows]``."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """An encoded prompt.

    Only the model that made it knows what the tensors are: hidden states, a mask, a pooled vector,
    sizes. The engine keeps it, counts its bytes and passes it back to the model.

    Attributes:
        tensors: tensors by names of the model's choice, without a row dimension.
        length: number of tokens that the network attends to.
        company: must be equal for conditioning whose rows share a forward pass, in addition to
            the model's ``group_key``.
    """

    tensors: Mapping[str, Tensor]
    length: int
    company: Hashable = None

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes; elements that a view repeats count once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, eq=False)
class StackedConditioning:
    """Conditioning of the rows of a forward pass, as stacked by the model.

    Attributes:
        tensors: tensors by names of the model's choice, each ``[rows, ...]``; at least one.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> device:
        """Device of the tensors."""
        return next(iter(self.tensors.values())).device

    def select(self, rows: Tensor) -> StackedConditioning:
        """Select some rows, which may be repeated.

        Args:
            rows: int64 ``[n]`` on the same device, so that indexing needs no synchronization.
        """
        return StackedConditioning(
            {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        )

    def divided(self, counts: Sequence[int]) -> list[StackedConditioning]:
        """Split the rows into consecutive parts.

        Args:
            counts: number of rows of each part, which add up to all rows.
        """
        if len(counts) == 1:
            return [self]
        split = {name: tensor.split([*counts]) for name, tensor in self.tensors.items()}
        return [
            StackedConditioning({name: parts[i] for name, parts in split.items()})
            for i in range(len(counts))
        ]

    def put(self, rows: Tensor, others: StackedConditioning) -> StackedConditioning:
        """Replace some rows.

        Args:
            rows: indices of the rows, int64 ``[n]``.
            others: ``n`` rows of the same model and of the same length.
        """
        return StackedConditioning(
            {
                name: tensor.index_copy(0, rows, others.tensors[name])
                for name, tensor in self.tensors.items()
            }
        )


def joined(parts: Sequence[StackedConditioning]) -> StackedConditioning:
    """Concatenate the rows of several stacks that were split from one."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].tensors
    return StackedConditioning(
        {name: torch.cat([one.tensors[name] for one in parts]) for name in names}
    )


def stack_alike(rows: Sequence[Conditioning]) -> StackedConditioning:
    """Stack the conditioning of rows whose tensors have the same shapes."""
    return StackedConditioning(
        {name: torch.stack([row.tensors[name] for row in rows]) for name in rows[0].tensors}
    )


def stack_padded(
    rows: Sequence[Conditioning], text: str, *, multiple: int = 1, places: int | None = None
) -> StackedConditioning:
    """Stack the conditioning of rows whose texts have different lengths.

    ``LENGTHS`` is added, and ``MASK`` unless all rows attend to all places: attention is fastest
    without a mask.

    Args:
        rows: conditioning with the same names. Tensors other than the text have the same shape.
        text: name of the tensor ``[tokens, features]`` whose length is that of the prompt. It is
            padded with zeros to the longest of the rows.
        multiple: a row attends to its text and to the padding up to the next multiple of this.
        places: length to pad to instead of the longest, so that the shape is independent of the
            rows.
    """
    texts = [row.tensors[text] for row in rows]
    # Computed on the CPU, which needs no synchronization.
    lengths = torch.tensor([len(tensor) for tensor in texts])
    attended = lengths + -lengths % multiple
    longest = int(attended.max()) if places is None else places
    device = texts[0].device
    stacked = {
        name: torch.stack([row.tensors[name] for row in rows])
        for name in rows[0].tensors
        if name != text
    }
    stacked[text] = torch.stack(
        [F.pad(tensor, (0, 0, 0, longest - len(tensor))) for tensor in texts]
    )
    stacked[LENGTHS] = lengths.to(device, non_blocking=True)
    if places is not None or int(attended.min()) < longest:
        mask = torch.arange(longest) < attended[:, None]
        stacked[MASK] = mask.to(device, non_blocking=True)
    return StackedConditioning(stacked)
