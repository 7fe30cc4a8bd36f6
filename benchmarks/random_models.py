"""Pipelines with the sizes of published models and random weights, on which speed does not depend.

There are tiny sizes as well, with which a benchmark can be tried without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from embedded import MODEL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["sd15", "sd15_autoencoder", "sdxl", "z_image"]

BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}

QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def sd15(device: torch.device, dtype: torch.dtype, *, taesd: bool = False) -> Any:
    """A ``StableDiffusionPipeline`` with Stable Diffusion 1.5's sizes, 512 pixels.

    Args:
        device: device on which it is created.
        dtype: dtype of its weights.
        taesd: with the small autoencoder of TAESD's sizes in place of its own.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = _clip_tokenizer()
    text = _clip_config(tokenizer, width=768, heads=12, layers=12)
    torch.manual_seed(0)
    with device:
        networks = {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            "text_encoder": CLIPTextModel(text),
        }
    parts: dict[str, Any] = {
        **_ready(networks, dtype),
        "vae": sd15_autoencoder(device, dtype, taesd=taesd),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def sd15_autoencoder(device: torch.device, dtype: torch.dtype, *, taesd: bool = False) -> Any:
    """The autoencoder of :func:`sd15`; see there."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(1)
    with device:
        network = AutoencoderTiny() if taesd else AutoencoderKL(**_vae(512))
    return _ready({"vae": network}, dtype)["vae"]


def sdxl(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Any:
    """A ``StableDiffusionXLPipeline``, 1024 pixels.

    Args:
        device: device on which it is created.
        dtype: dtype of its weights.
        tiny: whether it is for 64 pixels, with networks of two levels.
    """
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    widths = (32, 64) if tiny else (768, 1280)
    unet: dict[str, Any] = {
        "sample_size": 32 if tiny else 128,
        "block_out_channels": (32, 64) if tiny else (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (1 if tiny else 2),
        "up_block_types": ("CrossAttnUpBlock2D",) * (1 if tiny else 2) + ("UpBlock2D",),
        # In this class the name means the number of heads.
        "attention_head_dim": (2, 4) if tiny else (5, 10, 20),
        "transformer_layers_per_block": (1, 2) if tiny else (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + widths[1],
        "cross_attention_dim": sum(widths),
    }
    sizes = (4, 3) if tiny else (12, 12), (4, 3) if tiny else (20, 32)
    texts = [
        _clip_config(tokenizer, width, heads, layers)
        for width, (heads, layers) in zip(widths, sizes, strict=True)
    ]
    torch.manual_seed(0)
    with device:
        networks = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**_vae(64 if tiny else 1024, tiny=tiny), scaling_factor=0.13025),
            "text_encoder": CLIPTextModel(texts[0]),
            "text_encoder_2": CLIPTextModelWithProjection(texts[1]),
        }
    parts: dict[str, Any] = {
        **_ready(networks, dtype),
        "tokenizer": tokenizer,
        "tokenizer_2": _clip_tokenizer(),
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    }
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def z_image(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Any:
    """A ``ZImagePipeline`` with the Turbo model's sizes, 1024 pixels.

    Its text encoder has two layers instead of 36, as texts are encoded once and cached.

    Args:
        device: device on which it is created.
        dtype: dtype of its weights.
        tiny: whether it is for 64 pixels, with a transformer of two layers.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = _qwen_tokenizer()
    small: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4}
    small |= {"n_kv_heads": 4, "cap_feat_dim": 32, "axes_dims": [8, 4, 4]}
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32 if tiny else 2560,
        intermediate_size=64 if tiny else 9728,
        num_hidden_layers=2,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        head_dim=8 if tiny else 128,
    )
    vae: dict[str, Any] = _vae(64 if tiny else 1024, tiny=tiny) | {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    torch.manual_seed(0)
    with device:
        networks = {
            "transformer": ZImageTransformer2DModel(**small if tiny else {}),
            "vae": AutoencoderKL(**vae),
            "text_encoder": Qwen3Model(text),
        }
    return ZImagePipeline(
        **_ready(networks, dtype),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _ready(networks: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    for network in networks.values():
        network.to(dtype=dtype).eval().requires_grad_(requires_grad=False)
    return dict(networks)


def _vae(side: int, *, tiny: bool = False) -> dict[str, Any]:
    widths = (32, 64) if tiny else (128, 256, 512, 512)
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 1 if tiny else 2,
        "latent_channels": 4,
        "sample_size": side,
    }


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", model_max_length=77)


def _clip_config(tokenizer: Any, width: int, heads: int, layers: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _qwen_tokenizer() -> Any:
    """A tokenizer with one token per byte."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *QWEN_MARKS)
    vocabulary = {token: place for place, token in enumerate(alphabet)}
    tokenizer: Any = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=QWEN_MARKS[1:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer
