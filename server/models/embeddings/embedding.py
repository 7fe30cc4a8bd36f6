"""A loaded textual inversion embedding: vectors that take the place of a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Embedding"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Embedding:
    """An embedding, loaded for one model (Gal et al., arXiv 2208.01618).

    Attributes:
        name: word that stands for it in prompts.
        revision: first 16 hexadecimal digits of the SHA-256 of its file.
        vectors: for each text encoder, by its name in a model folder: token embeddings that replace
            those of the word, ``[vectors, width]``; the number of vectors is the same for all.
    """

    name: str
    revision: str
    vectors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.vectors.values())
