"""What a family supplies of its text encoders, whatever its denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from server.models.conditioning import Conditioning
    from server.models.text_options import TextOptions


def lowered(prompt: str) -> str:
    """A prompt in small letters, as the pipelines of PixArt and SANA prepare theirs."""
    return prompt.lower().strip()


class TextSide(Protocol):
    """How a family turns prompts into conditioning."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, markers not counted."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, markers not counted; safe from any thread."""
        ...

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """See ``HostedModel.encode_prompts``."""
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoders by their names in a model folder."""
        ...


class EmbeddableText(Protocol):
    """The text side of a model with a U-Net: CLIP encoders, whose prompts may name embeddings."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, markers not counted."""
        ...

    @property
    def clip_skips(self) -> range:
        """See ``ModelFacts``."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """See ``EmbeddingTarget``."""
        ...

    def count_tokens(self, text: str, embeddings: Mapping[str, int]) -> int:
        """Tokens of a prompt, markers not counted; safe from any thread.

        Args:
            text: the prompt.
            embeddings: how many vectors stand for each name.
        """
        ...

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """See ``HostedModel.encode_prompts``."""
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoders by their names in a model folder."""
        ...
