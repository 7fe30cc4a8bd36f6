"""Loaded weights do not change when their files do."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedded import MODEL_FOLDER
from server.models.adapters.adapter import Adapter
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.folder import DERIVED, adapters_folder
from server.models.image_prompts.shelf import ImagePromptShelf
from server.models.image_prompts.unet_image_prompts import UNetImagePrompts
from server.models.loading import load_model
from server.models.weight_memory import WeightMemory
from tests.server.models.controls.tiny_controls import put_depth, shelf_of
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder


def test_weights_on_a_cpu_stay_as_they_were_when_their_files_are_overwritten(
    tmp_path: Path,
) -> None:
    # Each file has the data type of the weights, so that conversion copies nothing.
    without = shutil.ignore_patterns("ems-*", "linear-*")
    folder = shutil.copytree(MODEL_FOLDER, tmp_path / "model", ignore=without)
    model = load_model(folder, name="m", device="cpu", dtype="float32")
    unet: Any = model.modules()["unet"]
    put_depth(model, tmp_path / "controls")
    put_encoder(tmp_path / "prompts")
    put_adapter(unet, tmp_path / "prompts", "shown", 1)
    room, own = 2**26, (model.device, model.dtype)
    adapters = AdapterShelf(
        (adapters_folder(folder),),
        Target.of("m", model.adaptable()),
        WeightMemory[Adapter](room, "adapters"),
        *own,
    )
    prompts = ImagePromptShelf(
        [tmp_path / "prompts"],
        "m",
        UNetImagePrompts(unet).widths,
        WeightMemory[Any](room, "IP-Adapters"),
        *own,
    )
    control: Any = shelf_of(model, tmp_path / "controls").load("depth")
    shown = prompts.load("shown")
    drawn_in_few = adapters.load("embedded-lcm-lora")

    networks = [*model.modules().values(), control.network, shown.encoder.network, shown.projection]
    held: list[Tensor] = [shown.keys_and_values]
    held += chain.from_iterable(one.state_dict().values() for one in networks)
    changes = chain.from_iterable(part.values() for part in drawn_in_few.parts.values())
    held += chain.from_iterable((one.down, one.up) for one in changes)
    before = [tensor.clone() for tensor in held]
    files = [*tmp_path.rglob("*.safetensors")]
    assert {DERIVED, "unet", "vae", "text_encoder", "depth", "image_encoder", "prompts"} <= {
        name for file in files for name in file.parts
    }
    for file in files:
        with file.open("r+b") as stream:
            stream.write(b"\xff" * file.stat().st_size)
    assert all(map(torch.equal, held, before))
