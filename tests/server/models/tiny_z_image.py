"""A tiny Z-Image with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from tests.server.models.tiny_qwen import VOCABULARY, byte_tokenizer

TURBO_SHIFT, BASE_SHIFT = 3.0, 6.0

TEXT = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    # Far from the default, so that no hidden state is nearly that of another layer.
    initializer_range=0.5,
)
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 32,
    "axes_dims": [8, 4, 4],
    "axes_lens": [1024, 64, 64],
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "sample_size": 48,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make(shift: float) -> Any:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(**TRANSFORMER)
    # These are initialized to zeros, which no trained model has.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=Qwen3Model(TEXT).eval(),
        tokenizer=byte_tokenizer(),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
