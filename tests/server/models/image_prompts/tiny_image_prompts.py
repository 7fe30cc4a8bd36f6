"""Tiny IP-Adapters and image encoders with random weights, in the layout of the authors' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from server.models.hosted import HostedModel
from server.models.image_prompts.image_prompt import ImagePromptUse
from server.models.image_prompts.shelf import ImagePromptShelf
from server.models.weight_memory import WeightMemory
from server.requests.image_prompts import ImagePromptSettings, load_image_prompts

ROOM = 2**26
SIDE, PROJECTED, HIDDEN = 16, 24, 20
RESAMPLER = 64
"""Width of a resampler's tokens: that of a head, as diffusers assumes."""


def put_encoder(folder: Path, name: str = "image_encoder", **config: Any) -> Path:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "projection_dim": PROJECTED,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        # Far from the default, so that pictures and layers differ clearly.
        "initializer_factor": 4.0,
    }
    network: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes | config))
    network.eval().save_pretrained(folder / name)
    return folder / name


def cross_attention(unet: Any) -> list[Attention]:
    """The layers that an adapter has keys and values for, in diffusers' order."""
    names = [name for name in unet.attn_processors if "attn2" in name]
    return [unet.get_submodule(name.removesuffix(".processor")) for name in names]


def put_adapter(
    unet: Any, folder: Path, name: str, seed: int, *, tokens: int | None = None
) -> Path:
    """An IP-Adapter ``NAME.safetensors`` of a U-Net.

    Args:
        unet: the U-Net.
        folder: folder to put it in.
        name: name of the file.
        seed: seed of the weights.
        tokens: number of tokens that its resampler makes of a picture, as in those called plus;
            None for four tokens by a single layer.
    """
    folder.mkdir(exist_ok=True, parents=True)
    generator = torch.Generator().manual_seed(seed)
    text = unet.config.cross_attention_dim

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    made = projection(text, weight) if tokens is None else resampler(text, tokens, weight)
    state = {f"image_proj.{key}": one for key, one in made.items()}
    for number, layer in enumerate(cross_attention(unet)):
        for part in ("to_k_ip", "to_v_ip"):
            key = f"ip_adapter.{2 * number + 1}.{part}.weight"
            state[key] = 2 * weight(layer.inner_dim, text)
    save_file(state, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def projection(text: int, weight: Any) -> dict[str, Tensor]:
    return {
        "proj.weight": weight(4 * text, PROJECTED),
        "proj.bias": weight(4 * text, 1)[:, 0],
        "norm.weight": torch.ones(text),
        "norm.bias": weight(text, 1)[:, 0],
    }


def resampler(text: int, tokens: int, weight: Any) -> dict[str, Tensor]:
    state = {
        "latents": weight(tokens, RESAMPLER)[None],
        "proj_in.weight": weight(RESAMPLER, HIDDEN),
        "proj_in.bias": weight(RESAMPLER, 1)[:, 0],
        "proj_out.weight": weight(text, RESAMPLER),
        "proj_out.bias": weight(text, 1)[:, 0],
        "norm_out.weight": torch.ones(text),
        "norm_out.bias": torch.zeros(text),
    }
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            state[f"layers.{layer}.{norm}.weight"] = torch.ones(RESAMPLER)
            state[f"layers.{layer}.{norm}.bias"] = weight(RESAMPLER, 1)[:, 0]
        for name, rows, columns in (
            ("0.to_q", RESAMPLER, RESAMPLER),
            ("0.to_kv", 2 * RESAMPLER, RESAMPLER),
            ("0.to_out", RESAMPLER, RESAMPLER),
            ("1.1", 4 * RESAMPLER, RESAMPLER),
            ("1.3", RESAMPLER, 4 * RESAMPLER),
        ):
            state[f"layers.{layer}.{name}.weight"] = weight(rows, columns)
    return state


def shelf_of(model: HostedModel, *folders: Path, max_bytes: int = ROOM) -> ImagePromptShelf:
    memory = WeightMemory[Any](max_bytes, "IP-Adapters")
    attention = model.image_attention
    widths = None if attention is None else attention.widths
    own = model.facts.name, widths, memory, model.device, model.dtype
    return ImagePromptShelf(folders, *own)


def use(
    model: HostedModel, name: str, *seeds: int, region: Tensor | None = None, **how: Any
) -> ImagePromptUse:
    """An image prompt by an adapter of the model's, with a random picture for each seed."""
    chosen = ImagePromptSettings(name=name, **how)
    pictures = [random_picture(seed) for seed in seeds]
    [made] = load_image_prompts([chosen], [pictures], [region], model)
    return made


def random_picture(seed: int) -> Tensor:
    pixels = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    # Like an upload, with whole numbers.
    return (255 * pixels).round() / 127.5 - 1
