"""Adapters in the formats that LoRA files are published in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, tensor

from server.models.adapters.adapter import LowRank

Parts = Mapping[str, Mapping[str, LowRank]]
Format = Callable[[Parts], "tuple[dict[str, Tensor], dict[str, str]]"]

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def factors(change: LowRank) -> tuple[Tensor, Tensor]:
    """Both factors as files hold them: those of a convolution are two convolutions."""
    up = change.up if change.down.ndim == 2 else change.up[..., None, None]
    return change.down.contiguous(), up.contiguous()


def peft(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers saves today: with peft's names and without alphas."""
    made: dict[str, Tensor] = {}
    for part, layers in parts.items():
        for layer, change in layers.items():
            down, up = factors(change)
            made |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    return made, {"format": "pt"}


def peft_with_config(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same with peft's configs, which hold the alphas, one of them for a layer by its name."""
    made, metadata = peft(parts)
    configs: dict[str, object] = {}
    for part, layers in parts.items():
        names = list(layers)
        own = {
            "r": layers[names[0]].rank,
            "lora_alpha": 3,
            "alpha_pattern": {names[-1]: 1},
            "target_modules": names,
        }
        configs |= {f"{part}.{entry}": value for entry, value in own.items()}
    return made, metadata | {"lora_adapter_metadata": json.dumps(configs)}


def older(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers saved earlier: attention under its processors, other layers under `lora`."""
    made: dict[str, Tensor] = {}
    for part, layers in parts.items():
        for layer, change in layers.items():
            block, _, own = layer.removesuffix(".0").rpartition(".")
            attention = own in ("to_q", "to_k", "to_v", "to_out")
            name = f"{block}.processor.{own}_lora" if attention else f"{layer}.lora"
            if part != "unet":
                short = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
                named = own in short
                name = f"{block}.{short[own]}_lora" if named else f"{layer}.lora_linear_layer"
            down, up = factors(change)
            made |= {f"{part}.{name}.down.weight": down, f"{part}.{name}.up.weight": up}
    return made, {"format": "pt"}


def kohya(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As kohya's scripts and LyCORIS save: flat names, with an alpha of 2 for each layer."""
    made: dict[str, Tensor] = {}
    for part, layers in parts.items():
        for layer, change in layers.items():
            whole = layer if part == "unet" else f"text_model.{layer.removeprefix('text_model.')}"
            name = f"{KOHYA[part]}_{whole.replace('.', '_')}"
            down, up = factors(change)
            made |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": tensor(2.0),
            }
    return made, {"ss_base_model_version": "sdxl_base_v1-0"}


def saved(made: tuple[dict[str, Tensor], dict[str, str]], path: Path) -> Path:
    tensors, metadata = made
    save_file(tensors, path, metadata)
    return path
