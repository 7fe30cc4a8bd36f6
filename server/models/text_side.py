"""The interface to a family's text encoders, independent of its denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from server.models.conditioning import Conditioning
    from server.models.text_options import TextOptions


def to_lowercase(prompt: str) -> str:
    """Lowercase and strip a prompt, as the pipelines of PixArt and SANA do."""
    return prompt.lower().strip()


class TextSide(Protocol):
    """Encodes prompts to conditioning for a family."""

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding markers."""
        ...

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding markers; safe from any thread."""
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
    """The text side of a U-Net model: CLIP encoders, whose prompts may use embeddings."""

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding markers."""
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
        """Number of tokens of a prompt, excluding markers; safe from any thread.

        Args:
            text: the prompt.
            embeddings: number of vectors that each embedding name stands for.
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
