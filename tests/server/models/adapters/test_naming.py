"""Trainers' names are mapped to the model's layers, and original names to those of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import Tensor

from server.models.adapters.naming import named
from server.models.adapters.original_layers import ORIGINAL
from server.models.adapters.original_unet import original_names
from tests.server.models.original_layers import (
    FLUX_1,
    FLUX_2,
    NORMS_OF,
    STABLE_DIFFUSION_3,
    WIDTH,
    Z_IMAGE,
    whole,
)
from tests.server.models.tiny_sdxl import UNET

LAYERS = {
    "unet": {"mid_block.attentions.0.proj_in": (4, 4), "conv_in": (4, 4, 3, 3)},
    "text_encoder": {"encoder.layers.0.mlp.fc1": (4, 4)},
    "text_encoder_2": {"text_model.encoder.layers.0.mlp.fc1": (4, 4), "text_projection": (4, 4)},
}


@pytest.mark.parametrize(
    ("written", "network", "layer"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down", "unet", 0),
        ("lycoris_mid_block_attentions_0_proj_in.lora_down", "unet", 0),
        ("lora_transformer_mid_block_attentions_0_proj_in.lora_down", "unet", 0),
        ("diffusion_model.mid_block.attentions.0.proj_in.lora_A", "unet", 0),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A", "unet", 0),
        ("unet.mid_block.attentions.0.proj_in.lora_A.default", "unet", 0),
        ("mid_block.attentions.0.proj_in.lora_A", "unet", 0),
        ("unet.conv_in.lora.down", "unet", 1),
        # ComfyUI's trainer and OneTrainer's "original" format write the original code's names.
        ("diffusion_model.middle_block.1.proj_in.lora_down", "unet", 0),
        ("input_blocks.0.0.lora_A", "unet", 1),
        ("lora_unet_middle_block_1_proj_in.lora_down", "unet", 0),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down", "text_encoder", 0),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down", "text_encoder", 0),
        # ComfyUI's name of the text encoder of Stable Diffusion 2.
        (
            "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A",
            "text_encoder",
            0,
        ),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A",
            "text_encoder",
            0,
        ),
        ("text_encoder_2.encoder.layers.0.mlp.fc1.lora_linear_layer.down", "text_encoder_2", 0),
        ("lora_te2_text_projection.lora_down", "text_encoder_2", 1),
    ],
)
def test_a_layer_is_found_by_each_trainers_name(written: str, network: str, layer: int) -> None:
    found, others = named({f"{written}.weight": torch.ones(1)}, LAYERS)
    assert (others, [*found]) == ({}, [network])
    assert [*found[network]] == [f"{[*LAYERS[network]][layer]}.lora_A.weight"]


KINDS = [
    (
        "FluxTransformer2DModel",
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        FLUX_1,
    ),
    (
        "Flux2Transformer2DModel",
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        FLUX_2,
    ),
    (
        "ZImageTransformer2DModel",
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        Z_IMAGE,
    ),
    (
        "SD3Transformer2DModel",
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        STABLE_DIFFUSION_3,
    ),
]


@pytest.mark.parametrize(("kind", "convert", "sizes"), KINDS)
def test_layers_of_the_original_code_are_those_of_diffusers_converters(
    kind: str, convert: Callable[[dict[str, Tensor]], dict[str, Any]], sizes: Mapping[str, int]
) -> None:
    """A change of rank 1 with first factor 1 equals its second factor, a weight of one input."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(outs * WIDTH, 1, generator=generator) for name, outs in sizes.items()
    }
    theirs = {
        name.removesuffix(".weight"): one
        for name, one in convert(whole(kind, weights)).items()
        if name.endswith(".weight") and one.ndim == 2
    }
    shapes = {name: (len(one), WIDTH) for name, one in theirs.items()}
    file = {f"diffusion_model.{name}.lora_B.weight": weight for name, weight in weights.items()}
    found, others = named(file, {"transformer": shapes}, ORIGINAL[kind])
    ours = {k.removesuffix(".lora_B.weight"): one for k, one in found["transformer"].items()}
    assert not others
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("kind", "convert", "sizes"), KINDS)
def test_norms_of_the_original_code_are_those_of_diffusers_converters(
    kind: str, convert: Callable[[dict[str, Tensor]], dict[str, Any]], sizes: Mapping[str, int]
) -> None:
    norms = {name: torch.tensor([1.0 + i]) for i, name in enumerate(NORMS_OF[kind])}
    weights = {name: torch.zeros(outs * WIDTH, 1) for name, outs in sizes.items()}
    theirs = {
        name.removesuffix(".weight"): one
        for name, one in convert(whole(kind, weights) | norms).items()
        if name.endswith(".weight") and any(one is mark for mark in norms.values())
    }
    file = {
        f"diffusion_model.{name.removesuffix('.weight')}.diff": one for name, one in norms.items()
    }
    layers = {"transformer": dict.fromkeys(theirs, (1,))}
    found, others = named(file, layers, ORIGINAL[kind])
    assert not others
    assert {k.removesuffix(".w_norm"): one for k, one in found["transformer"].items()} == theirs
    assert len(theirs) == len(norms)


STABLE_DIFFUSION_1: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}


@pytest.mark.parametrize("config", [STABLE_DIFFUSION_1, UNET], ids=["sd1", "tiny-xl"])
def test_a_u_nets_original_names_are_those_that_diffusers_reads(config: dict[str, Any]) -> None:
    """Checked for all layers and norms, in a checkpoint that diffusers converts."""
    with torch.device("meta"):
        network: Any = UNet2DConditionModel(**config)
    layers = {
        name: (len(module.weight),)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    originals = original_names(layers)
    marks = {layer: torch.tensor(float(place)) for place, layer in enumerate(layers)}
    checkpoint = {
        f"model.diffusion_model.{original}.{end}": marks[layer]
        for layer, original in originals.items()
        for end in ("weight", "bias")
    }
    theirs = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, dict(network.config))
    read = {k.removesuffix(".weight"): one for k, one in theirs.items() if k.endswith(".weight")}
    assert originals.keys() == layers.keys()
    assert read == marks
