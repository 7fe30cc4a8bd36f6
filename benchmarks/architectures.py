"""The models that benchmarks run on, in the form that each system needs.

    python -m benchmarks.architectures sd15 FOLDER --device cuda

writes one of them as a model folder, for benchmarks that start a server on it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embedded import MODEL_FOLDER
from samplers import NoiseSchedule
from server.models.clip import CLIP
from server.models.hosted import ModelFacts
from server.models.loading import choose_device, choose_dtype
from server.models.stable_diffusion import OneEncoder
from server.models.unet_model import UNetModel

if TYPE_CHECKING:
    from server.models.hosted import HostedModel

SCALED_LINEAR: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model, hosted by Weft and as diffusers' pipeline, with the same weights.

    Attributes:
        hosted: for the engine.
        pipeline: a ``StableDiffusionPipeline``.
        side: width and height of the pictures in pixels.
    """

    hosted: HostedModel
    pipeline: Any
    side: int


def build(architecture: str, device: str, dtype: str) -> Architecture:
    """``embedded``, or ``sd15``: Stable Diffusion 1.5's sizes with random weights."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    return {"embedded": _embedded, "sd15": _sd15}[architecture](place, kind)


def _embedded(device: torch.device, dtype: torch.dtype) -> Architecture:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER, dtype=dtype)
    pipeline.to(device)
    return _both(pipeline, device, dtype, 128)


def _sd15(device: torch.device, dtype: torch.dtype) -> Architecture:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }
    with device:
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(text),
        }
    parts: dict[str, Any] = {
        **{name: model.to(dtype=dtype) for name, model in models.items()},
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(**SCALED_LINEAR),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    return _both(pipeline, device, dtype, 512)


def _both(pipeline: Any, device: torch.device, dtype: torch.dtype, side: int) -> Architecture:
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    facts = ModelFacts(
        name="model",
        revision="",
        denoiser="",
        prediction=config.prediction_type,
        latent_channels=pipeline.unet.config.in_channels,
        latent_scale=pipeline.vae_scale_factor,
        size_multiple=pipeline.vae_scale_factor,
        default_width=side,
        default_height=side,
        max_tokens=pipeline.tokenizer.model_max_length - 2,
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(requires_grad=False)
    hosted = UNetModel(
        facts,
        device,
        dtype,
        schedule=NoiseSchedule.from_diffusers(config),
        unet=pipeline.unet,
        vae=pipeline.vae,
        text=OneEncoder(CLIP(pipeline.text_encoder, pipeline.tokenizer, device)),
    )
    return Architecture(hosted, pipeline, side)


def main() -> None:
    """Write a model folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures")
    parser.add_argument("architecture", choices=("embedded", "sd15"))
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--device", default="auto", help="where random weights are drawn")
    parser.add_argument("--dtype", default="auto", help="that they are kept in")
    options = parser.parse_args()
    build(options.architecture, options.device, options.dtype).pipeline.save_pretrained(
        options.folder
    )


if __name__ == "__main__":
    main()
