"""A tokenizer of Qwen's kind whose tokens are single bytes."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
VOCABULARY = 256 + len(SPECIAL)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""A template that gives the same as Qwen3's own for one message of a user."""


def byte_tokenizer(more: tuple[str, ...] = ()) -> Any:
    """The tokenizer.

    Args:
        more: special tokens after the usual ones.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = *SPECIAL, *more
    vocabulary = {token: place for place, token in enumerate((*alphabet, *special))}
    tokenizer: Any = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
