"""A tiny Stable Diffusion 3.5 with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from embedded import MODEL_FOLDER
from tests.server.models.tiny_sdxl import text_config
from tests.server.models.tiny_text import T5_WIDTH, t5_encoder, t5_tokenizer

CLIP_WIDTHS = 8, 12
BLOCKS = 3
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make(*, with_t5: bool = True) -> Any:
    """The pipeline; its second tokenizer pads with another token, as OpenCLIP's does.

    Args:
        with_t5: whether it has the third text encoder.
    """
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    first, second = (
        CLIPTextModelWithProjection(text_config(width)).eval() for width in CLIP_WIDTHS
    )
    folder = MODEL_FOLDER / "tokenizer"
    third: dict[str, Any] = {
        "text_encoder_3": t5_encoder() if with_t5 else None,
        "tokenizer_3": t5_tokenizer() if with_t5 else None,
    }
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=first,
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        text_encoder_2=second,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder, pad_token="<|unknown|>"),
        **third,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
