"""A T5 text encoder with its tokenizer."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from server.models.parts import load_text_encoder, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

MARKERS = 1
"""The token of the end, which counts towards the length."""


class EncodedText(NamedTuple):
    """What a text encoder makes of prompts.

    Attributes:
        states: last hidden states, ``[prompts, tokens, features]``.
        mask: which tokens are no padding, bool ``[prompts, tokens]``.
    """

    states: Tensor
    mask: Tensor


class T5:
    """Encodes prompts at one length: padded, or cut off.

    Args:
        encoder: a ``T5EncoderModel`` in inference mode.
        tokenizer: whose ``model_max_length`` is the length.
        device: where the encoder runs.
    """

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer refuses two threads at once.
        self._tokenizing = Lock()

    @classmethod
    def load(
        cls, folder: Path, suffix: str, length: int, device: torch.device, dtype: torch.dtype
    ) -> T5:
        """The text encoder and the tokenizer of a model folder.

        Args:
            folder: of the model.
            suffix: of both parts' names, such as ``_2``.
            length: tokens of every prompt; a shorter ``model_max_length`` of the tokenizer counts.
            device: where the encoder runs.
            dtype: of its weights.

        Raises:
            ModelMismatch: a part of another class, or weights that are not those of its config.
        """
        from transformers import T5EncoderModel, T5Tokenizer

        encoder = load_text_encoder(folder, f"text_encoder{suffix}", T5EncoderModel, dtype)
        tokenizer = load_tokenizer(folder, f"tokenizer{suffix}", T5Tokenizer, length)
        return cls(encoder, tokenizer, device)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, the marker of its end not counted."""
        return self._tokenizer.model_max_length - MARKERS

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, the marker of its end not counted; safe from any thread."""
        with self._tokenizing:
            return len(self._tokenizer(text, verbose=False).input_ids) - MARKERS

    def encode(self, prompts: Sequence[str], *, masked: bool) -> EncodedText:
        """The last hidden states.

        Args:
            prompts: one a row.
            masked: whether the encoder's attention leaves the padding out. Models differ: what it
                reads changes the states of the prompt's own tokens too.
        """
        with self._tokenizing:
            tokens = self._tokenizer(
                list(prompts),
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
        ids = tokens.input_ids.to(self._device)
        mask = tokens.attention_mask.to(self._device)
        states = self.encoder(ids, attention_mask=mask if masked else None).last_hidden_state
        return EncodedText(states, mask.bool())
