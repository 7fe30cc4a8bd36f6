"""A CLIP text encoder with its tokenizer."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from server.models.emphasis import Chunk, WeightedPrompt, chunks_of, segments_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

COMMA = ",</w>"
"""Token of a comma that ends a word."""

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
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer refuses two threads at once.
        self._tokenizing = Lock()

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, markers not counted."""
        return self._tokenizer.model_max_length - MARKERS

    @property
    def layers(self) -> int:
        """How many the encoder has."""
        return self.encoder.config.num_hidden_layers

    def normalised(self, output: Any, skip: int) -> Tensor:
        """The hidden states of a layer, by the norm that follows the last one.

        Args:
            output: of the encoder.
            skip: the layer, counted from the last, which is 1.
        """
        if skip == 1:
            return output.last_hidden_state
        trunk = getattr(self.encoder, "text_model", self.encoder)
        return trunk.final_layer_norm(output.hidden_states[-skip])

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, markers not counted; safe from any thread.

        Of a weighted prompt, those of its chunks, which are filled up.
        """
        if isinstance(text, WeightedPrompt):
            return len(self._chunks(text)) * self.max_tokens
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

    def encode_weighted(self, prompt: WeightedPrompt) -> tuple[Any, Tensor]:
        """The encoder's output for the chunks of a prompt, and the weights of their tokens.

        Returns:
            The output as of :meth:`encode`, a row a chunk, and ``[chunks, tokens]``.
        """
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        filler = self._tokenizer.pad_token_id
        rows: list[list[int]] = []
        weights: list[list[float]] = []
        for chunk in self._chunks(prompt):
            left = self.max_tokens - len(chunk.tokens)
            rows.append([start, *chunk.tokens, end, *[filler] * left])
            weights.append([1.0, *chunk.weights, 1.0, *[1.0] * left])
        tokens = torch.tensor(rows, device=self._device)
        output = self.encoder(tokens, output_hidden_states=True, return_dict=True)
        return output, torch.tensor(weights, device=self._device)

    def _chunks(self, prompt: WeightedPrompt) -> list[Chunk]:
        with self._tokenizing:
            comma = self._tokenizer.get_vocab().get(COMMA, -1)
            return chunks_of(segments_of(prompt), self._tokens, comma=comma, room=self.max_tokens)

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def clip_skips(own: int, *clips: CLIP) -> range:
    """The layers, counted from the last, whose hidden states all of some encoders have.

    Args:
        own: the one that the model was trained with.
        clips: the encoders.
    """
    return range(own, min(clip.layers for clip in clips) + 1)
