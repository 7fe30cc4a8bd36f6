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
"""The end token, which counts toward the length."""


class EncodedText(NamedTuple):
    """The output of a text encoder for prompts.

    Attributes:
        states: last hidden states, ``[prompts, tokens, features]``.
        mask: whether each token is not padding, bool ``[prompts, tokens]``.
    """

    states: Tensor
    mask: Tensor


class T5:
    """Encodes prompts at a fixed length, padded or truncated.

    Args:
        encoder: a ``T5EncoderModel`` in inference mode.
        tokenizer: its tokenizer, whose ``model_max_length`` is the length.
        device: device of the encoder.
    """

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer raises an error if two threads use it at once.
        self._tokenizing = Lock()

    @classmethod
    def load(
        cls, folder: Path, suffix: str, length: int, device: torch.device, dtype: torch.dtype
    ) -> T5:
        """Load the text encoder and the tokenizer of a model folder.

        Args:
            folder: model folder.
            suffix: suffix of both parts' names, such as ``_2``.
            length: number of tokens of every prompt, unless the tokenizer's ``model_max_length`` is
                smaller.
            device: device of the encoder.
            dtype: dtype of its weights.

        Raises:
            ModelMismatch: a part of another class, or weights that do not match its config.
        """
        from transformers import T5EncoderModel, T5Tokenizer

        encoder = load_text_encoder(folder, f"text_encoder{suffix}", T5EncoderModel, dtype)
        tokenizer = load_tokenizer(folder, f"tokenizer{suffix}", T5Tokenizer, length)
        return cls(encoder, tokenizer, device)

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding the end marker."""
        return self._tokenizer.model_max_length - MARKERS

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding the end marker; safe from any thread."""
        with self._tokenizing:
            return len(self._tokenizer(text, verbose=False).input_ids) - MARKERS

    def encode(self, prompts: Sequence[str], *, masked: bool) -> EncodedText:
        """The last hidden states of prompts.

        Args:
            prompts: prompts, one per row.
            masked: whether the encoder's attention ignores the padding. Models differ in this, and
                it affects the states of the prompt's own tokens, too.
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
