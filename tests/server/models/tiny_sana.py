"""A tiny SANA with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from string import printable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

WIDTH = 16
TIMESTEP_SCALE = 0.5
SPECIAL = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"
VOCABULARY = {token: place for place, token in enumerate((*SPECIAL, *printable.replace(" ", "")))}


def gemma_tokenizer() -> Any:
    """One token per character, after the start token."""
    return GemmaTokenizer(vocab=VOCABULARY, merges=[], add_bos_token=True)


def gemma_encoder() -> Any:
    config = Gemma2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        # Far from the default, so that the text shows in the states.
        initializer_range=0.5,
    )
    return Gemma2Model(config).eval()


def autoencoder(latent_channels: int = 4) -> Any:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {
            f"{side}_block_types": ("ResBlock", "EfficientViTBlock"),
            f"{side}_block_out_channels": (8, 16),
            f"{side}_layers_per_block": (1, 1),
            f"{side}_qkv_multiscales": ((), (5,)),
        }
    return AutoencoderDC(
        latent_channels=latent_channels, attention_head_dim=8, scaling_factor=0.41407, **sides
    )


def make(*, sprint: bool) -> Any:
    """The pipeline.

    Args:
        sprint: whether it is SANA-Sprint's.
    """
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
        # SANA's pipeline uses this, and SANA-Sprint's does not.
        timestep_scale=TIMESTEP_SCALE,
    ).eval()
    flow = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    kind: Any = SanaSprintPipeline if sprint else SanaPipeline
    pipeline = kind(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=autoencoder().eval(),
        transformer=transformer,
        scheduler=SCMScheduler() if sprint else flow,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
