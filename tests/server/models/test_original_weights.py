"""Networks are read from files under the names of their original code, whatever the file's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from server.errors import ModelMismatch
from server.models.original_weights import as_diffusers
from server.models.parts import build_network
from tests.server.models.original_layers import FLUX_1, WIDTH, whole
from tests.server.models.original_networks import (
    WITHIN,
    flux2,
    pixart,
    qwen_image,
    sana,
    sana_1,
    stable_diffusion_3,
    unet,
    z_image,
)


@pytest.mark.parametrize(
    "make", [z_image, flux2, qwen_image, stable_diffusion_3, pixart, sana_1, unet]
)
def test_a_published_file_in_the_folder_of_a_network_is_read(make: Any, tmp_path: Path) -> None:
    network, tensors = make()
    network.save_config(tmp_path / "part")
    save_file(
        {name: one.clone() for name, one in tensors.items()},
        tmp_path / "part" / "published-v1.0.safetensors",
    )
    ours = build_network(tmp_path, "part", type(network), torch.float32).state_dict()
    theirs = network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_file({f"{WITHIN}odd": torch.ones(1)}, tmp_path / "part" / "published-v1.0.safetensors")
    with pytest.raises(ModelMismatch, match="lacks the tensor"):
        build_network(tmp_path, "part", type(network), torch.float32)


def flux1() -> tuple[Any, dict[str, Tensor]]:
    """FLUX.1 at the published width, which its converter assumes, without memory for weights."""
    weights = {name: torch.ones(outs * WIDTH, 1) for name, outs in FLUX_1.items()}
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return network, whole("FluxTransformer2DModel", weights)


@pytest.mark.parametrize("scale", ["scale", "weight"])
def test_all_layers_of_flux_have_the_names_of_diffusers(scale: str) -> None:
    """ComfyUI's files have called scales of queries and keys weights since 2026."""
    network, tensors = flux1()
    tensors = {re.sub("_norm.scale$", f"_norm.{scale}", k): one for k, one in tensors.items()}
    made = as_diffusers(tensors, network, "it", torch.float32)
    assert made.keys() == network.state_dict().keys()


@pytest.mark.parametrize("change", [lambda one: one[: len(one) // 2], lambda _: None])
def test_flux_of_another_width_or_without_single_blocks_is_refused(change: Any) -> None:
    network, tensors = flux1()
    tensors = {
        name: change(one) if name.startswith("single_blocks") else one
        for name, one in tensors.items()
    }
    tensors = {name: one for name, one in tensors.items() if one is not None}
    with pytest.raises(ModelMismatch, match=r"^it has original names, but not the blocks or the w"):
        as_diffusers(tensors, network, "it", torch.float32)


@pytest.mark.parametrize("make", [flux2, stable_diffusion_3, pixart])
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_what_cannot_be_divided_into_queries_keys_and_values_is_refused(
    make: Any, shape: tuple[int, ...]
) -> None:
    network, tensors = make()
    joined = next(name for name in tensors if "qkv" in name)
    with pytest.raises(ModelMismatch, match=r"^it has original names, but not the blocks or the w"):
        as_diffusers(tensors | {joined: torch.ones(shape)}, network, "it", torch.float32)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    ("given", "named", "expected", "described"),
    [(flux1, "FLUX.1", flux2, "FLUX.2"), (flux2, "FLUX.2", flux1, "FLUX.1")],
)
def test_weights_of_the_other_flux_are_named(
    given: Any, named: str, expected: Any, described: str, original: bool
) -> None:
    network, tensors = given()
    tensors = tensors if original else network.state_dict()
    with pytest.raises(ModelMismatch) as refusal:
        as_diffusers(tensors, expected()[0], "it", torch.float32)
    assert refusal.value.message == (
        f"it has the weights of {named}, but its config describes the network of {described}."
    )


@pytest.mark.parametrize(("sprint", "named"), [(True, "SANA-Sprint"), (False, "SANA 1.5")])
def test_a_sana_whose_original_names_cannot_be_read_is_named(sprint: bool, named: str) -> None:
    """SANA 1.5 has the norms of SANA-Sprint, and no embedded guidance."""
    network, tensors = sana(sprint=True)
    own = {name: one for name, one in tensors.items() if sprint or "cfg_embedder" not in name}
    with pytest.raises(ModelMismatch) as refusal:
        as_diffusers(own, network, "it", torch.float32)
    assert refusal.value.message.startswith(
        f"it has the weights of {named} under their original names, which can be read of SANA 1.0"
    )


def test_a_file_trained_on_references_at_timestep_zero_needs_a_config_that_says_so() -> None:
    """ComfyUI's file of Qwen-Image-Edit-2511 is one (``comfy/model_detection.py``)."""
    with torch.device("meta"):
        networks = [
            QwenImageTransformer2DModel(num_layers=1, zero_cond_t=zero) for zero in (True, False)
        ]
    tensors = {"__index_timestep_zero__": torch.zeros(0), "img_in.weight": torch.ones(1)}
    tensors = {f"{WITHIN}{name}": tensor for name, tensor in tensors.items()}
    made = as_diffusers(tensors, networks[0], "it", torch.float32)
    assert made.keys() == {"img_in.weight"}
    with pytest.raises(ModelMismatch, match=r"it has __index_timestep_zero__: .* by zero_cond_t"):
        as_diffusers(tensors, networks[1], "it", torch.float32)
