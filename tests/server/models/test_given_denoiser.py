"""A denoiser in one file replaces a model's own, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.errors import ModelMismatch
from server.models.given_denoiser import with_denoiser
from server.models.loading import load_model
from server.models.weight_files import bytes_in_memory
from server.service.hosting import host
from server.settings import Settings
from tests.server.models import tiny_sdxl
from tests.server.models.original_names import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.saved(tiny_sdxl.make(tiny_sdxl.BASE), tmp_path_factory.mktemp("m") / "xl")


def other_unet() -> Any:
    """A U-Net with other weights than the folder's."""
    made = tiny_sdxl.make(tiny_sdxl.BASE)
    for parameter in made.unet.parameters():
        parameter.data += 0.1
    return made


def test_a_model_has_the_denoiser_of_the_file_and_all_else_of_the_folder(
    folder: Path, tmp_path: Path
) -> None:
    other = other_unet()
    file, cache = tmp_path / "finetune.safetensors", tmp_path / "cache"
    save_file(checkpoint(other), file)
    (folder / "weft" / "adapters").mkdir(parents=True)
    (folder / "weft" / "ems-none.safetensors").touch()
    made = with_denoiser(folder, file, cache)
    plain, model = (
        load_model(one, name="m", device="cpu", dtype="float32") for one in (folder, made)
    )
    ours, theirs = model.modules(), {**plain.modules(), "unet": other.unet}
    for part, network in theirs.items():
        state = ours[part].state_dict()
        assert all(torch.equal(state[k], tensor) for k, tensor in network.state_dict().items())
    assert model.facts.denoiser != plain.facts.denoiser
    assert [path.name for path in (made / "weft").iterdir()] == ["adapters"]
    assert with_denoiser(folder, file, cache) == made
    save_file(checkpoint(other) | {"more": torch.ones(1)}, file)
    assert with_denoiser(folder, file, cache) != made


def test_other_networks_of_a_file_take_no_memory(folder: Path, tmp_path: Path) -> None:
    whole = checkpoint(other_unet())
    unet = {name: one for name, one in whole.items() if name.startswith("model.diffusion_model.")}
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(unet, tmp_path / "unet.safetensors")
    all_in_one, alone = (
        bytes_in_memory(
            with_denoiser(folder, tmp_path / f"{name}.safetensors", tmp_path / "cache"),
            torch.float32,
        )
        for name in ("whole", "unet")
    )
    assert all_in_one == alone


def test_what_is_no_file_of_a_denoiser_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match=r"^denoiser 'x\.ckpt' is not a \.safetensors or \.gg"):
        with_denoiser(folder, tmp_path / "x.ckpt", tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ModelMismatch, match="has no unet or transformer whose weights"):
        with_denoiser(tmp_path, tmp_path / "x.safetensors", tmp_path)


def test_the_setting_names_a_model_and_a_path(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(1)}, file)
    chosen: dict[str, Any] = {
        "denoisers": (f"xl={file}",),
        "cache": tmp_path / "cache",
        "device": "cpu",
    }
    assert Settings(**chosen).denoiser_of("xl") == file
    with pytest.raises(ValueError, match="denoisers has 'xl=none'; allowed is `name=path`"):
        Settings(denoisers=("xl=none",))
    with pytest.raises(ModelMismatch, match=r"^unet of model folder .*/x-\w+' lacks the tensors"):
        host(Settings(models=(str(folder),), **chosen))
    with pytest.raises(ModelMismatch, match="denoisers names the model 'xl'; there are other"):
        host(Settings(models=(f"other={folder}",), **chosen))
