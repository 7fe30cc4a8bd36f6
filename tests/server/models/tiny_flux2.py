"""A tiny FLUX.2 klein with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.server.models.tiny_qwen import VOCABULARY, byte_tokenizer

LENGTH = 60
"""Tokens of every prompt; the template takes about forty bytes of them."""

WIDTH = 16
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 30,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    # Far from the default, so that every layer changes the states.
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "sample_size": 32,
}


def make(*, distilled: bool) -> Any:
    """The pipeline."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKLFlux2(**VAE).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=32,
        guidance_embeds=False,
    ).eval()
    # Otherwise the text would hardly change the transformer's output.
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(2)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = LENGTH
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**TEXT)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
