"""How the texts of an image are encoded, beside what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["AS_USUAL", "TextOptions"]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """The options hold for all texts of an image, its unconditional among them.

    Attributes:
        clip_skip: layer of the CLIP text encoders, counted from the last, whose hidden states the
            denoiser reads: 1 is the last, 2 the one before it. None is the model's own.
    """

    clip_skip: int | None = None


AS_USUAL: Final = TextOptions()
