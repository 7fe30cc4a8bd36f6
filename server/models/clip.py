"""A CLIP text encoder with its tokenizer."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

MARKERS = 2
"""Tokens of start and end, which count towards the text encoder's length."""


class CLIP:
    """Encodes prompts at one length: padded with the tokenizer's own token, or cut off.

    Args:
        encoder: a ``CLIPTextModel`` or ``CLIPTextModelWithProjection`` in inference mode.
        tokenizer: whose ``model_max_length`` is the length.
        device: where the encoder runs.
    """

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self.encoder = encoder.to(device)
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer refuses two threads at once.
        self._tokenizing = Lock()

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, markers not counted."""
        return self._tokenizer.model_max_length - MARKERS

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, markers not counted; safe from any thread."""
        with self._tokenizing:
            return len(self._tokenizer(text, verbose=False).input_ids) - MARKERS

    def encode(self, prompts: Sequence[str]) -> Any:
        """The encoder's output, with the hidden states of all its layers."""
        with self._tokenizing:
            tokens = self._tokenizer(
                list(prompts),
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        return self.encoder(tokens.to(self._device), output_hidden_states=True, return_dict=True)
