"""A tiny Stable Diffusion XL with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from embedded import MODEL_FOLDER

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
BASE = EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)
TURBO = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS)


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=58,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        # Far from the default, so that no hidden state is nearly that of another layer.
        initializer_factor=4.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    # In this class the name stands for the number of heads.
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 6 * 8 + 48,
    "cross_attention_dim": 32 + 48,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    # Groups of at least two channels: in a uniform picture, a single one would be rounding noise.
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.13025,
}


def make(scheduler: Any, **unet: Any) -> Any:
    """The pipeline; its second tokenizer pads with another token, as OpenCLIP's does.

    Args:
        scheduler: scheduler of the pipeline.
        unet: entries of the U-Net's config beside or in place of those here.
    """
    torch.manual_seed(0)
    folder = MODEL_FOLDER / "tokenizer"
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**UNET | unet),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(text_config(32)),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(48)),
    }
    for part in parts.values():
        part.eval()
    pipeline = StableDiffusionXLPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder, pad_token="<|unknown|>"),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
