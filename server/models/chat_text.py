"""Prompts in a chat template, encoded by a causal language model at their own length."""

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
"""Of conditioning, the hidden states of a text, ``[tokens, features]``."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What stands around a prompt, and how much of the whole is read.

    Attributes:
        head: before the prompt.
        tail: behind it.
        dropped: tokens at the beginning that the denoiser does not read.
        places: the most tokens behind these that it does.
    """

    head: str
    tail: str
    places: int
    dropped: int = 0


class ChatText:
    """Hidden states of each prompt at its own length; the unconditional is a prompt too.

    Args:
        encoder: the text encoder, on the device.
        states: what is read of it, ``[1, tokens, features]``, for tokens int64 ``[1, tokens]``.
        tokenizer: of the encoder.
        template: around every prompt.
        device: where the encoder runs.
        unconditional: the prompt of the unconditional.
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
        # A fast tokenizer refuses two threads at once.
        self._tokenizing = Lock()
        self._markers = len(self._tokens(""))

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, the template not counted."""
        return self._template.dropped + self._template.places - self._markers

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, the template not counted; safe from any thread."""
        return len(self._tokens(text)) - self._markers

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt, whatever the size of the picture."""
        # One by one: no place is wasted on padding, and no bit depends on the other prompts. What
        # fills up a batch of fixed size is encoded once.
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
