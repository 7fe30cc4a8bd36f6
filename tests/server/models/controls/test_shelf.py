"""ControlNets by name: which fit a model, how much memory they take, and what is refused."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.errors import ControlMismatch, Overloaded
from server.models import memory as device_memory
from server.models.controls.control import Control
from server.models.controls.shelf import ControlShelf
from server.models.controls.unet_control import UNetControl
from server.models.hosted import ModelFacts
from server.models.memory import DeviceMemory
from server.models.weight_memory import WeightMemory
from tests.server.models.controls.tiny_controls import Plain, put_plain, with_an_effect
from tests.server.models.original_names import unet_name
from tests.server.models.tiny_sdxl import UNET

BYTES = 4 * (2 * 2 + 2)
"""Size of a ControlNet of width 2."""


def shelved(folder: Path, max_bytes: int = 3 * BYTES) -> tuple[ControlShelf, WeightMemory[Control]]:
    memory = WeightMemory[Control](max_bytes, "ControlNets")
    cpu = torch.device("cpu")
    return ControlShelf([folder], "small", Plain(), memory, cpu, torch.float32), memory


def test_those_are_listed_that_fit_the_model(tmp_path: Path) -> None:
    for name in ("line art", "depth"):
        put_plain(tmp_path, name)
    put_plain(tmp_path, "wide", width=3)
    put_plain(tmp_path, "<lora:x:1>")
    (tmp_path / "file.safetensors").touch()
    (tmp_path / "empty").mkdir()
    shelf, _ = shelved(tmp_path)
    assert [one.name for one in shelf.available()] == ["depth", "line art"]
    put_plain(tmp_path, "later")
    assert "later" in [one.name for one in shelf.available()]


def other_class(folder: Path) -> None:
    edit(folder / "config.json", _class_name="FluxControlNetModel")


def other_width(folder: Path) -> None:
    edit(folder / "config.json", width=3)


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_tensors(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").write_text("a pickle")


def no_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def one_missing(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({"layer.bias": load_file(file)["layer.bias"]}, file)


def strange_index(folder: Path) -> None:
    index = {"weight_map": {"layer.weight": ["a list"], "layer.bias": "a" * 300}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            other_class,
            "ControlNet 'depth' is a FluxControlNetModel; those of model 'small' are of Network.",
        ),
        (
            other_width,
            "ControlNet 'depth' does not fit model 'small': it has width 3, where 2 is needed.",
        ),
        (no_json, "config.json of ControlNet 'depth' is not valid JSON: "),
        (
            no_tensors,
            "diffusion_pytorch_model.safetensors of ControlNet 'depth' is not a safetensors file.",
        ),
        (
            no_weights,
            "ControlNet 'depth' has no diffusion_pytorch_model.safetensors; weights are expected",
        ),
        (strange_index, "ControlNet 'depth' has no "),
        (one_missing, "ControlNet 'depth' lacks the tensor layer.weight."),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_without_its_place(
    tmp_path: Path, spoil: Any, says: str
) -> None:
    put_plain(tmp_path, "depth")
    spoil(tmp_path / "depth")
    shelf, _ = shelved(tmp_path)
    with pytest.raises(ControlMismatch, match=f"^{re.escape(says)}") as refused:
        shelf.load("depth")
    assert str(tmp_path) not in refused.value.message


def test_a_controlnet_is_read_once_while_there_is_room_and_again_when_it_changed(
    tmp_path: Path,
) -> None:
    for name in ("a", "b", "c", "d"):
        put_plain(tmp_path, name)
    shelf, memory = shelved(tmp_path)
    first = shelf.load("a")
    assert shelf.load("a") is first
    held = [shelf.load(name) for name in ("b", "c")]
    assert memory.bytes == 3 * BYTES
    with pytest.raises(Overloaded, match="The ControlNets of running requests fill"):
        shelf.load("d")
    del held
    gc.collect()
    assert shelf.load("d").name == "d"
    put_plain(tmp_path, "a")
    del first
    gc.collect()
    shelf.forget()
    assert memory.bytes == 0


def test_one_that_could_never_be_loaded_is_refused_and_one_that_cannot_be_now_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_plain(tmp_path, "depth")
    shelf, _ = shelved(tmp_path, max_bytes=BYTES - 1)
    with pytest.raises(
        ControlMismatch, match=f"takes {BYTES} bytes of memory; at most {BYTES - 1}"
    ):
        shelf.find("depth")
    monkeypatch.setattr(device_memory, "measure", lambda _: DeviceMemory(BYTES - 1, 10**9))
    with pytest.raises(Overloaded, match=f"needs {BYTES} bytes of memory, of which {BYTES - 1}"):
        shelved(tmp_path)[0].load("depth")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device_memory, "measure", lambda _: DeviceMemory(BYTES, 10**9))
    monkeypatch.setattr(Plain, "prepared", full)
    with pytest.raises(Overloaded, match=f"needs {BYTES} bytes of memory, which are not free now"):
        shelved(tmp_path)[0].load("depth")


def test_one_that_nobody_uses_makes_room_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may take more bytes in all than the device has beside its model."""
    for name in ("canny", "depth"):
        put_plain(tmp_path, name)
    shelf, memory = shelved(tmp_path)

    def measured(_: torch.device) -> DeviceMemory:
        return DeviceMemory(BYTES - memory.bytes, BYTES)

    monkeypatch.setattr(device_memory, "measure", measured)
    shelf.load("canny")
    used = shelf.load("depth")
    assert memory.bytes == BYTES
    with pytest.raises(Overloaded, match="of which 0 are free"):
        shelf.load("canny")
    assert used.name == "depth"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, None),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, None),
        ({"cross_attention_dim": 1024}, "has cross_attention_dim 1024, where 80 is needed"),
        ({"block_out_channels": [320, 640]}, "has block_out_channels (320, 640), where (16, 32)"),
        ({"global_pool_conditions": True}, "has global_pool_conditions True, where False"),
        (
            {"conditioning_embedding_out_channels": [16, 32, 64]},
            "has conditioning_embedding_out_channels [16, 32, 64], which does not reduce",
        ),
    ],
)
def test_the_controlnets_of_a_unet_have_its_widths(
    config: dict[str, Any], says: str | None
) -> None:
    facts: Any = ModelFacts("xl", "", "", "epsilon", 4, 2, 4, 64, 64, 30)
    alike = (
        "block_out_channels",
        "cross_attention_dim",
        "layers_per_block",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    own = {name: UNET[name] for name in alike} | {"conditioning_embedding_out_channels": [16, 32]}
    kind = UNetControl(UNet2DConditionModel(**UNET), facts, torch.device("cpu"))
    found = kind.misfit(own | config)
    assert found is None if says is None else found is not None and found.startswith(says)


HINT = ("conv_in", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5")
"""Convolutions of the picture's embedding, each followed by an activation in the original code."""


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ControlNet as the original code of ControlNet names them."""
    made: dict[str, Tensor] = {}
    embedding = {name: 2 * place for place, name in enumerate((*HINT, "conv_out"))}
    for name, tensor in state.items():
        layer, _, kind = name.removeprefix("controlnet_cond_embedding.").rpartition(".")
        if name.startswith("controlnet_cond_embedding."):
            own = f"input_hint_block.{embedding[layer]}.{kind}"
        elif name.startswith("controlnet_down_blocks."):
            own = f"zero_convs.{layer.rpartition('.')[2]}.0.{kind}"
        elif name.startswith("controlnet_mid_block."):
            own = f"middle_block_out.0.{kind}"
        else:
            own = unet_name(name)
        made[f"control_model.{own}"] = tensor.clone()
    return made


@pytest.fixture(scope="module")
def of_unet() -> UNetControl:
    """For a U-Net whose latents are an eighth as wide as pictures, as published ones are."""
    facts: Any = ModelFacts("xl", "", "", "epsilon", 4, 8, 16, 64, 64, 30)
    return UNetControl(UNet2DConditionModel(**UNET), facts, torch.device("cpu"))


def shelf_of_unet(folder: Path, kind: UNetControl) -> ControlShelf:
    memory = WeightMemory[Control](2**30, "ControlNets")
    return ControlShelf([folder], "xl", kind, memory, torch.device("cpu"), torch.float32)


def test_a_controlnet_in_a_single_file_is_loaded_by_either_names(
    of_unet: UNetControl, tmp_path: Path
) -> None:
    made = ControlNetModel.from_unet(of_unet.denoiser, load_weights_from_unet=False)
    theirs = dict(with_an_effect(made).state_dict())
    save_file(original(theirs), tmp_path / "canny.safetensors")
    save_file(theirs, tmp_path / "depth.safetensors")
    shelf = shelf_of_unet(tmp_path, of_unet)
    assert [one.name for one in shelf.available()] == ["canny", "depth"]
    for name in ("canny", "depth"):
        ours = shelf.load(name).network
        embedded = {
            f"controlnet_cond_embedding.{k}": one
            for k, one in ours.embed_picture.state_dict().items()
        }
        state = {**ours.state_dict(), **embedded}
        assert all(torch.equal(state[key], theirs[key]) for key in theirs)


def test_a_single_file_of_another_sort_is_refused(of_unet: UNetControl, tmp_path: Path) -> None:
    zero = {"control_model.zero_convs.0.0.weight": torch.ones(1)}
    save_file({"lllite_unet.weight": torch.ones(1)}, tmp_path / "lllite.safetensors")
    save_file(zero, tmp_path / "shuffle.safetensors")
    save_file(zero, tmp_path / "half.safetensors")
    (tmp_path / "none.safetensors").write_bytes(b"PK")
    shelf = shelf_of_unet(tmp_path, of_unet)
    assert [*shelf.unfit()] == ["lllite", "none", "shuffle"]
    assert "control LoRA, LLLite and T2I-Adapters are not supported" in shelf.unfit()["lllite"]
    assert "has global_pool_conditions True" in shelf.unfit()["shuffle"]
    assert "is not a safetensors file" in shelf.unfit()["none"]
    with pytest.raises(ControlMismatch, match=r"^half\.safetensors of ControlNet 'half' lacks the"):
        shelf.load("half")


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        # As kohya-ss/ControlNet-diff-modules: all tensors of a ControlNet, without the base's part.
        ("difference", "holds differences from a base model's weights"),
        # As stabilityai/control-lora.
        ("lora_controlnet", "is a control LoRA"),
        # As xinsir's ProMax, of diffusers' ControlNetUnionModel.
        ("task_embedding", "is a union of several kinds"),
    ],
)
def test_a_single_file_that_only_looks_like_a_controlnet_is_not_offered(
    of_unet: UNetControl, tmp_path: Path, tensor: str, what: str
) -> None:
    zero = {"control_model.zero_convs.0.0.weight": torch.ones(1), tensor: torch.ones(1)}
    save_file(zero, tmp_path / "other.safetensors")
    shelf = shelf_of_unet(tmp_path, of_unet)
    assert not shelf.available()
    assert f"{what} (it has the tensor {tensor}), which is not supported" in shelf.unfit()["other"]


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
