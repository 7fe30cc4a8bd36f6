"""A tiny FLUX.1 with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from embedded import MODEL_FOLDER
from tests.server.models.tiny_sdxl import text_config
from tests.server.models.tiny_text import T5_WIDTH, t5_encoder, t5_tokenizer

VAE: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "sample_size": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
DEV: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL: dict[str, Any] = {"shift": 1.0}


def make(
    scheduler: dict[str, Any], *, guided: bool, channels: int = 16, kind: Any = FluxPipeline
) -> Any:
    """The pipeline.

    Args:
        scheduler: entries of its scheduler's config.
        guided: whether the transformer has a guidance scale as input, as that of dev does.
        channels: channels of a token that the transformer reads; 2 x 2 cells have 16.
        kind: class of the pipeline.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=CLIPTextModel(text_config(32)).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer"),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
