"""Prompts in a chat template, encoded by a causal language model without padding."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import torch

from server.models.conditioning import Conditioning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from server.models.text_options import TextOptions

__all__ = ["TEXT", "ChatTemplate", "ChatText"]

TEXT: Final = "text"
"""Name of the conditioning tensor with the hidden states of a text, ``[tokens, features]``."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Text around a prompt, and the range of tokens that the denoiser reads.

    Attributes:
        head: text before the prompt.
        tail: text after the prompt.
        dropped: number of tokens at the beginning that the denoiser does not read.
        places: maximum number of tokens after these that it reads.
    """

    head: str
    tail: str
    places: int
    dropped: int = 0


class ChatText:
    """Encodes each prompt at its own length; the unconditional is a prompt, too.

    Args:
        encoder: text encoder, on its device.
        states: computes the hidden states ``[1, tokens, features]`` that the denoiser reads, from
            tokens int64 ``[1, tokens]``.
        tokenizer: tokenizer of the encoder.
        template: template around every prompt.
        device: device of the encoder.
        unconditional: prompt that stands for the unconditional.
    """

    def __init__(
        self,
        encoder: nn.Module,
        states: Callable[[Tensor], Tensor],
        tokenizer: Any,
        template: ChatTemplate,
        device: torch.device,
        unconditional: str = "",
    ) -> None:
        self._encoder = encoder
        self._states = states
        self._tokenizer = tokenizer
        self._template = template
        self._device = device
        self._unconditional = unconditional
        # A fast tokenizer raises an error if two threads use it at once.
        self._tokenizing = Lock()
        self._markers = len(self._tokens(""))

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding the template."""
        return self._template.dropped + self._template.places - self._markers

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding the template; safe from any thread."""
        return len(self._tokens(text)) - self._markers

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt; it does not depend on the image size."""
        # One by one: nothing is wasted on padding, and no bit depends on the other prompts.
        # Duplicates, which fill up a batch of fixed size, are encoded only once.
        made = {
            prompt: self._encoded(self._unconditional if prompt is None else prompt)
            for prompt in dict.fromkeys(prompts)
        }
        return [made[prompt] for prompt in prompts]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoder by its name in a model folder."""
        return {"text_encoder": self._encoder}

    def _encoded(self, prompt: str) -> Conditioning:
        dropped, places = self._template.dropped, self._template.places
        tokens = torch.tensor([self._tokens(prompt)[: dropped + places]], device=self._device)
        text = self._states(tokens)[0, dropped:].clone()
        return Conditioning({TEXT: text}, len(text))

    def _tokens(self, prompt: str) -> list[int]:
        text = f"{self._template.head}{prompt}{self._template.tail}"
        with self._tokenizing:
            return self._tokenizer(text, verbose=False).input_ids
