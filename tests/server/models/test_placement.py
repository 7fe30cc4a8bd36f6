"""Which parts of a model are streamed from host memory, by the operator's choice and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from server.errors import ModelMismatch
from server.models.placement import Placement, first_that_fits, options
from server.models.streamed import stream_blocks
from server.models.weight_files import bytes_in_memory, bytes_on_host
from tests.server.models import tiny_sdxl

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_no_more_is_streamed_than_must_be() -> None:
    choices = options("auto", "none", CUDA)
    needs = dict(zip(choices, (300, 200, 100), strict=True))
    chosen = [first_that_fits(choices, needs.__getitem__, most) for most in (300, 299, 199, 0)]
    # What still does not fit is refused later, when its room is claimed.
    assert [one.offload for one in chosen] == ["none", "text", "all", "all"]


def test_what_a_placement_takes_is_read_from_the_headers(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "X"]}')
    (tmp_path / "transformer").mkdir()
    blocks = {f"blocks.{i}.to_q.weight": torch.zeros(64, 64 * (i + 1)) for i in range(3)}
    others = {"blocks.0.norm.weight": torch.zeros(64), "proj_out.weight": torch.zeros(64, 64)}
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**blocks, **others}, file)
    first, second, third, norm, outside = 64 * 64, 2 * 64 * 64, 3 * 64 * 64, 64, 64 * 64

    def needs(placement: Placement) -> int:
        return bytes_in_memory(tmp_path, torch.float16, placement)

    assert needs(Placement()) == 2 * (first + norm + second + third + outside)
    assert needs(Placement(offload="text")) == needs(Placement())
    assert needs(Placement(offload="all")) == 2 * (second + third + outside)
    assert needs(Placement("int8")) == first + second + third + 2 * (norm + outside)
    assert needs(Placement("fp8", "all")) == second + third + 2 * outside

    def on_host(placement: Placement) -> int:
        return bytes_on_host(tmp_path, torch.float16, placement)

    assert on_host(Placement()) == on_host(Placement(offload="text")) == 0
    # Three blocks take the room of four, a power of two.
    rounded = first + second + 4 * first + norm
    assert on_host(Placement(offload="all")) == 2 * rounded
    assert on_host(Placement("int8", "all")) == rounded + norm


def on_device(folder: Path) -> int:
    return bytes_in_memory(folder, torch.float32, Placement(offload="all"))


def test_of_a_streamed_unet_the_middle_stays_with_what_is_outside_of_blocks(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**tiny_sdxl.UNET)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "X"]}')
    stream_blocks(unet, CPU)
    groups: dict[str, int] = {}
    for name, module in unet.named_modules():
        hooks: Any = getattr(module, "_diffusers_hook", None)
        hook = None if hooks is None else hooks.get_hook("group_offloading")
        if hook is not None:
            own = {one for inner in hook.group.modules for one in inner.parameters()}
            groups[name] = sum(one.nbytes for one in own.union(hook.group.parameters))
    *_, second, first = sorted(size for name, size in groups.items() if name)
    assert on_device(tmp_path) == groups[""] + first + second


def test_blocks_of_the_original_unets_are_those_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "X"]}')
    (tmp_path / "unet").mkdir()
    names = [f"{part}_blocks.{i}.0.weight" for part in ("input", "output") for i in range(9)]
    names += [f"middle_block.{i}.weight" for i in range(3)]
    sizes = {name: 2**place for place, name in enumerate(names)}
    tensors = {f"model.diffusion_model.{k}": torch.zeros(n) for k, n in sizes.items()}
    save_file(tensors, tmp_path / "unet" / "x.safetensors")
    outside = sizes["input_blocks.0.0.weight"] + sum(
        size for name, size in sizes.items() if name.startswith("middle")
    )
    largest = sum(sizes[f"output_blocks.{i}.0.weight"] for i in range(3, 9))
    assert on_device(tmp_path) == 4 * (outside + largest)


def test_on_a_cpu_nothing_is_streamed() -> None:
    assert options("auto", "int8", CPU) == (Placement("int8"),)
    with pytest.raises(ModelMismatch, match="offload is 'text', but the device is a CPU"):
        options("text", "none", CPU)


def test_weights_of_four_bits_are_not_streamed() -> None:
    assert options("auto", "nf4", CUDA) == (Placement("nf4"),)
    with pytest.raises(ModelMismatch, match="quantize is 'nf4', whose weights cannot be streamed"):
        options("all", "nf4", CUDA)


def test_autoencoders_are_neither_quantised_nor_streamed() -> None:
    placement = Placement("int8", "all")
    parts = ("unet", "transformer", "text_encoder_2", "vae")
    assert [placement.quantizes(part) for part in parts] == [True, True, True, False]
    assert [placement.streams(part) for part in parts] == [True, True, True, False]
    only_text = Placement("none", "text")
    assert [only_text.streams(part) for part in parts] == [False, False, True, False]
