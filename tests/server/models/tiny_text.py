"""Tiny tokenizers and T5, for pipelines that tests make of config classes."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from transformers import T5Config, T5EncoderModel, T5Tokenizer

LENGTH = 20
T5_WIDTH = 24


def t5_tokenizer() -> Any:
    """One token per letter, padded to ``LENGTH``."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = special + [(letter, -3.0) for letter in ascii_lowercase]
    return T5Tokenizer(vocabulary, extra_ids=0, model_max_length=LENGTH)


def t5_encoder() -> Any:
    config = T5Config(
        vocab_size=30,
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        # Far from the default, so that the text shows in the states.
        initializer_factor=4.0,
    )
    return T5EncoderModel(config).eval()
