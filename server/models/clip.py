"""A CLIP text encoder with its tokenizer."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from server.models.embeddings.naming import divided
from server.models.emphasis import Chunk, EmphasizedPrompt, chunks_of, segments_of

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import Tensor

COMMA = ",</w>"
"""Token of a comma at the end of a word."""

MARKERS = 2
"""Number of start and end tokens, which count toward the text encoder's length."""

NONE: Final[Mapping[str, Any]] = MappingProxyType({})


class CLIP:
    """Encodes prompts at a fixed length: padded with the tokenizer's pad token, or truncated.

    Args:
        encoder: a ``CLIPTextModel`` or ``CLIPTextModelWithProjection`` in inference mode.
        tokenizer: its tokenizer, whose ``model_max_length`` is the length.
        device: device of the encoder.
    """

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer raises an error if two threads use it at once.
        self._tokenizing = Lock()

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding markers."""
        return self._tokenizer.model_max_length - MARKERS

    @property
    def layers(self) -> int:
        """Number of layers of the encoder."""
        return self.encoder.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of a token embedding."""
        return self.encoder.config.hidden_size

    def normalised(self, output: Any, skip: int) -> Tensor:
        """The hidden states of a layer, after the encoder's final layer norm.

        Args:
            output: output of the encoder.
            skip: the layer, counted from the last, which is 1.
        """
        if skip == 1:
            return output.last_hidden_state
        trunk = getattr(self.encoder, "text_model", self.encoder)
        return trunk.final_layer_norm(output.hidden_states[-skip])

    def count_tokens(self, text: str, embeddings: Mapping[str, int] = NONE) -> int:
        """Number of tokens of a prompt, excluding markers; safe from any thread.

        For a weighted prompt, this is the number of tokens of its chunks, including padding.

        Args:
            text: the prompt.
            embeddings: number of vectors that each embedding name stands for.
        """
        numbers = self._numbered(embeddings)
        if isinstance(text, EmphasizedPrompt):
            return len(self._chunks(text, numbers)) * self.max_tokens
        with self._tokenizing:
            return sum(map(len, self._pieces(text, numbers)))

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor] = NONE) -> Any:
        """The encoder's output, with the hidden states of all its layers.

        Args:
            prompts: prompts, one per row; truncated to the encoder's length.
            embeddings: vectors that replace each embedding name, ``[vectors, width]``.
        """
        numbers = self._numbered({name: len(own) for name, own in embeddings.items()})
        with self._tokenizing:
            read = [[*chain(*self._pieces(prompt, numbers))] for prompt in prompts]
        return self._run([self._framed(tokens[: self.max_tokens]) for tokens in read], embeddings)

    def encode_weighted(
        self, prompt: EmphasizedPrompt, embeddings: Mapping[str, Tensor] = NONE
    ) -> tuple[Any, Tensor]:
        """The encoder's output for the chunks of a prompt, and the weights of their tokens.

        Args:
            prompt: weighted prompt; each of its chunks is a row.
            embeddings: vectors that replace each embedding name, ``[vectors, width]``.

        Returns:
            The output as in :meth:`encode`, and the weights ``[chunks, tokens]``.
        """
        numbers = self._numbered({name: len(own) for name, own in embeddings.items()})
        rows: list[list[int]] = []
        weights: list[list[float]] = []
        for chunk in self._chunks(prompt, numbers):
            left = self.max_tokens - len(chunk.tokens)
            rows.append(self._framed(chunk.tokens))
            weights.append([1.0, *chunk.weights, 1.0, *[1.0] * left])
        return self._run(rows, embeddings), torch.tensor(weights, device=self._device)

    def _run(self, rows: Sequence[Sequence[int]], embeddings: Mapping[str, Tensor]) -> Any:
        tokens = torch.tensor(rows)
        beyond = tokens - self._words
        # The encoder locates the end of a text by its token ids; the start token cannot be the end.
        tokens = tokens.where(beyond < 0, self._tokenizer.bos_token_id).to(self._device)
        with self._replaced(beyond.to(self._device), embeddings):
            return self.encoder(tokens, output_hidden_states=True, return_dict=True)

    @contextmanager
    def _replaced(self, beyond: Tensor, embeddings: Mapping[str, Tensor]) -> Generator[None]:
        """Replace token embeddings by vectors of textual inversion where `beyond` is not negative.

        `beyond` holds the index of the vector. The replacement holds only for the forward pass
        inside the ``with`` block, and does not change the encoder's own embeddings.
        """
        if not embeddings:
            yield
            return
        vectors = torch.cat([*embeddings.values()])

        def replace(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
            return embedded.where(beyond[..., None] < 0, vectors[beyond.clamp_min(0)])

        hook = self.encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()

    @property
    def _words(self) -> int:
        """Size of the encoder's vocabulary; larger token ids stand for vectors of embeddings."""
        return self.encoder.config.vocab_size

    def _numbered(self, counts: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        """The token ids that stand for each name, in the order of all vectors."""
        numbers, first = dict[str, tuple[int, ...]](), self._words
        for name, count in counts.items():
            numbers[name] = (*range(first, first + count),)
            first += count
        return numbers

    def _framed(self, tokens: Sequence[int]) -> list[int]:
        """The tokens of a row, between start and end markers, padded to the full length."""
        tokenizer = self._tokenizer
        left = self.max_tokens - len(tokens)
        filler = [tokenizer.pad_token_id] * left
        return [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *filler]

    def _chunks(
        self, prompt: EmphasizedPrompt, numbers: Mapping[str, tuple[int, ...]]
    ) -> list[Chunk]:
        with self._tokenizing:
            comma = self._tokenizer.get_vocab().get(COMMA, -1)
            return chunks_of(
                segments_of(prompt),
                lambda text: self._pieces(text, numbers),
                comma=comma,
                room=self.max_tokens,
            )

    def _pieces(self, text: str, numbers: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The tokens of a text, each by itself, except that those of an embedding stay together."""
        pieces: list[tuple[int, ...]] = []
        for part, name in divided(text, numbers):
            if name is None:
                pieces += ((token,) for token in self._tokens(part))
            else:
                pieces.append(numbers[name])
        return pieces

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def clip_skips(own: int, *clips: CLIP) -> range:
    """The layers, counted from the last, that ``clip_skip`` may choose for all of the encoders.

    Args:
        own: layer that the model was trained with.
        clips: the encoders.
    """
    return range(own, min(clip.layers for clip in clips) + 1)
