"""A tiny Stable Diffusion with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from tests.server.models.tiny_sdxl import UNET
from tests.server.models.tiny_sdxl import make as make_xl

PARTS = "unet", "vae", "text_encoder", "tokenizer", "scheduler"


def make(scheduler: Any, kind: Any = StableDiffusionPipeline, **unet: Any) -> Any:
    """The pipeline.

    Args:
        scheduler: scheduler of the pipeline.
        kind: its class.
        unet: entries of the U-Net's config beside or in place of those of the tiny SDXL's.
    """
    parts: dict[str, Any] = dict(make_xl(scheduler).components)
    torch.manual_seed(0)
    config: dict[str, Any] = UNET | {"addition_embed_type": None, "cross_attention_dim": 32} | unet
    parts["unet"] = UNet2DConditionModel(**config).eval()
    pipeline = kind(
        **{name: parts[name] for name in PARTS},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
