"""How the texts of an image are encoded, beside what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from server.models.embeddings.naming import named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from server.models.embeddings.embedding import Embedding
    from server.models.references import SeenPicture

__all__ = ["AS_USUAL", "TextKey", "TextOptions"]

TextKey: TypeAlias = "tuple[int | None, tuple[tuple[str, str], ...], tuple[bytes, ...]]"
"""What of the options matters to one text: the layer, the embeddings that it names, the pictures.

Embeddings are named by name and revision: holding them here would keep them in memory.
"""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """The options hold for all texts of an image, its unconditional among them.

    Attributes:
        clip_skip: layer of the CLIP text encoders, counted from the last, whose hidden states the
            denoiser reads: 1 is the last, 2 the one before it. None is the model's own.
        embeddings: that the texts name; others of the server are words like any.
        pictures: that the text encoder sees with each of them.
    """

    clip_skip: int | None = None
    embeddings: tuple[Embedding, ...] = ()
    pictures: tuple[SeenPicture, ...] = ()

    def key(self, text: str | None) -> TextKey:
        """What must be the same for two encodings of a text to be the same."""
        revisions = {one.name: one.revision for one in self.embeddings}
        found = named(text or "", revisions) if revisions else ()
        said = tuple((name, revisions[name]) for name in found)
        return self.clip_skip, said, tuple(one.digest for one in self.pictures)

    def vectors(self, part: str) -> Mapping[str, Tensor]:
        """What a text encoder reads in place of each name, ``[vectors, width]``.

        Args:
            part: the encoder's name in a model folder.
        """
        return {one.name: one.vectors[part] for one in self.embeddings}


AS_USUAL: Final = TextOptions()
