"""A tiny PixArt with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.server.models.tiny_sdxl import VAE
from tests.server.models.tiny_text import T5_WIDTH, t5_encoder, t5_tokenizer

KINDS: dict[str, Any] = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}
BLOCKS = 2


def make(kind: str) -> Any:
    """The pipeline.

    Args:
        kind: ``alpha``, which has sizes as inputs like that of 1024 pixels, or ``sigma``.
    """
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if kind == "alpha" else 32,
        # Embeddings of sizes take thirds of the width.
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=BLOCKS,
        cross_attention_dim=48,
        caption_channels=T5_WIDTH,
    ).eval()
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 512
    pipeline = KINDS[kind](
        tokenizer=tokenizer,
        text_encoder=t5_encoder(),
        vae=AutoencoderKL(**VAE).eval(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
