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


class ClipText(TextSide, Protocol):
    """A text side of CLIP encoders whose hidden states the denoiser reads."""

    @property
    def clip_skips(self) -> range:
        """See ``ModelFacts``."""
        ...
