"""What a network is told of prompts: made and read by a model alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor, device

MASK = "mask"
"""Of stacked conditioning, the places that a row attends to, bool ``[rows, places]``."""

LENGTHS = "lengths"
"""Of stacked conditioning, the tokens of each row's text, int64 ``[rows]``."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """One prompt, encoded.

    Only the model that made it knows what the tensors are: hidden states, a mask, a pooled vector,
    sizes. The engine keeps it, counts its bytes and hands it back.

    Attributes:
        tensors: by names of the model's own, without a dimension of rows.
        length: tokens that the network attends to.
        company: equal in conditioning whose rows can share a forward, beside what the model's
            ``group_key`` says.
    """

    tensors: Mapping[str, Tensor]
    length: int
    company: Hashable = None

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes; what is repeated by a view counts once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


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

    def divided(self, counts: Sequence[int]) -> list[StackedConditioning]:
        """That of the first rows, of those that follow, and so on.

        Args:
            counts: of rows, which add up to all.
        """
        if len(counts) == 1:
            return [self]
        split = {name: tensor.split([*counts]) for name, tensor in self.tensors.items()}
        return [
            StackedConditioning({name: parts[i] for name, parts in split.items()})
            for i in range(len(counts))
        ]

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


def joined(parts: Sequence[StackedConditioning]) -> StackedConditioning:
    """The rows of one after those of another, all from one stack."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].tensors
    return StackedConditioning(
        {name: torch.cat([one.tensors[name] for one in parts]) for name in names}
    )


def stack_alike(rows: Sequence[Conditioning]) -> StackedConditioning:
    """The conditioning of rows whose tensors have the same shapes, in their order."""
    return StackedConditioning(
        {name: torch.stack([row.tensors[name] for row in rows]) for name in rows[0].tensors}
    )


def stack_padded(
    rows: Sequence[Conditioning], text: str, *, multiple: int = 1, places: int | None = None
) -> StackedConditioning:
    """The conditioning of rows of different lengths, in their order.

    ``LENGTHS`` is added, and ``MASK`` unless all rows attend to all places: without a mask
    attention is fastest.

    Args:
        rows: all of the same names. Tensors other than the text are of one shape.
        text: name of the tensor ``[tokens, features]`` that is as long as the prompt. It is padded
            with zeros to the longest of the rows.
        multiple: a row attends to as few places behind its text as make them a multiple of this.
        places: to pad to in place of the longest, so that the shape does not depend on the rows.
    """
    texts = [row.tensors[text] for row in rows]
    # Counted on the CPU, which nobody has to wait for.
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
