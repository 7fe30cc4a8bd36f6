"""Options for encoding the texts of an image."""

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
"""The options that affect one text: the layer, the embeddings that occur in it, and the images.

Embeddings are given by name and revision, as references to them would keep them in memory.
"""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Options for all texts of an image, including its unconditional.

    Attributes:
        clip_skip: layer of the CLIP text encoders, counted from the last, whose hidden states the
            denoiser reads: 1 is the last, 2 the one before it. None is the model's own.
        embeddings: embeddings that occur in the texts; other names are ordinary words.
        pictures: images that the text encoder sees with each text.
    """

    clip_skip: int | None = None
    embeddings: tuple[Embedding, ...] = ()
    pictures: tuple[SeenPicture, ...] = ()

    def key(self, text: str | None) -> TextKey:
        """Key that is equal for encodings of a text that have the same result."""
        revisions = {one.name: one.revision for one in self.embeddings}
        found = named(text or "", revisions) if revisions else ()
        said = tuple((name, revisions[name]) for name in found)
        return self.clip_skip, said, tuple(one.digest for one in self.pictures)

    def vectors(self, part: str) -> Mapping[str, Tensor]:
        """The vectors that replace each embedding name in a text encoder, ``[vectors, width]``.

        Args:
            part: name of the encoder in a model folder.
        """
        return {one.name: one.vectors[part] for one in self.embeddings}


AS_USUAL: Final = TextOptions()
