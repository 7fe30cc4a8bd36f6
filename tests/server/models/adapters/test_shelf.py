"""Adapters by name: which exist, how much memory they take, and when the disk is read."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.errors import AdapterMismatch, Overloaded
from server.models.adapters import adapter_file
from server.models.adapters.adapter import Adapter
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.weight_memory import WeightMemory
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes

NETWORK = nn.ModuleDict({"mid": nn.Linear(6, 5)})
BYTES = 4 * 2 * (6 + 5)
"""Size of a loaded adapter of rank 2."""


def shelved(
    *folders: Path, max_bytes: int = 3 * BYTES
) -> tuple[AdapterShelf, WeightMemory[Adapter]]:
    memory = WeightMemory[Adapter](max_bytes, "adapters")
    target = Target.of("small", {"unet": NETWORK})
    return AdapterShelf(folders, target, memory, torch.device("cpu"), torch.float32), memory


def put(folder: Path, *names: str, rank: int = 2, network: nn.Module = NETWORK) -> None:
    folder.mkdir(exist_ok=True)
    made = files.peft({"unet": changes(network, rank)})
    for name in names:
        files.saved(made, folder / f"{name}.safetensors")


def test_adapters_are_listed_that_fit_the_model(tmp_path: Path) -> None:
    put(tmp_path, "pastel", "line art")
    put(tmp_path, "of another model", network=nn.ModuleDict({"mid": nn.Linear(7, 5)}))
    (tmp_path / "broken.safetensors").write_text("no tensors")
    (tmp_path / "old.ckpt").write_text("a pickle")
    shelf, _ = shelved(tmp_path)
    assert [file.name for file in shelf.available()] == ["line art", "pastel"]
    for name, says in (
        ("of another model", r"weight has the shape \[5, 6\] in model 'small'"),
        ("broken", "is not a readable safetensors file"),
        ("old", "'old' is not among the adapters of model 'small'; these are: line art, pastel"),
    ):
        with pytest.raises(AdapterMismatch, match=says):
            shelf.find(name)


@pytest.mark.parametrize(
    "name",
    ["../pastel", "/etc/passwd", "sub/pastel", "pastel.safetensors", "..", "", "a\0b", "ä" * 500],
)
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    put(tmp_path, "pastel")
    put(tmp_path / "sub", "pastel")
    shelf, _ = shelved(tmp_path / "sub")
    with pytest.raises(AdapterMismatch, match="is not among the adapters of model 'small'"):
        shelf.load(name)


def test_names_with_signs_that_the_text_in_pictures_reads_are_not_offered(tmp_path: Path) -> None:
    put(tmp_path, "a<b", "a:b", "a,b", "-a", "a b-1.0+x", "ä")
    shelf, _ = shelved(tmp_path)
    assert [file.name for file in shelf.available()] == ["a b-1.0+x", "ä"]


def test_a_folder_is_read_anew_and_its_unchanged_files_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "pastel")
    shelf, _ = shelved(tmp_path)
    first = shelf.find("pastel")
    put(tmp_path, "ink", rank=4)
    assert [file.name for file in shelf.available()] == ["ink", "pastel"]
    assert shelf.find("pastel") is first
    (tmp_path / "ink.safetensors").unlink()
    assert [file.name for file in shelf.available()] == ["pastel"]
    put(tmp_path, "pastel", rank=4)
    assert shelf.find("pastel").rank == 4


def test_an_adapter_of_the_model_folder_goes_before_one_of_the_same_name(tmp_path: Path) -> None:
    put(tmp_path / "shared", "pastel", rank=4)
    put(tmp_path / "own", "pastel")
    shelf, _ = shelved(tmp_path / "shared", tmp_path / "own", tmp_path / "nowhere")
    assert shelf.find("pastel").rank == 2


def test_a_loaded_adapter_is_shared(tmp_path: Path) -> None:
    put(tmp_path, "pastel")
    shelf, memory = shelved(tmp_path)
    first = shelf.load("pastel")
    assert shelf.load("pastel") is first
    assert memory.bytes == first.nbytes == BYTES


def test_a_changed_file_is_another_adapter(tmp_path: Path) -> None:
    put(tmp_path, "pastel")
    shelf, _ = shelved(tmp_path)
    first = shelf.load("pastel")
    put(tmp_path, "pastel", rank=1)
    assert shelf.load("pastel").revision != first.revision


def test_the_least_recently_used_adapters_leave_for_others(tmp_path: Path) -> None:
    put(tmp_path, "a", "b", "c", "d")
    shelf, memory = shelved(tmp_path)
    for name in ("a", "b", "c", "a", "d"):
        shelf.load(name)
    gc.collect()
    assert memory.bytes == 3 * BYTES
    kept = shelf.load("a")
    assert shelf.load("a") is kept


def test_adapters_under_way_count_and_are_never_loaded_twice(tmp_path: Path) -> None:
    put(tmp_path, "a", "b", "c", "d")
    shelf, memory = shelved(tmp_path)
    held = {name: shelf.load(name) for name in ("a", "b", "c")}
    with pytest.raises(Overloaded, match="fill the memory for adapters"):
        shelf.load("d")
    assert shelf.load("b") is held["b"]
    del held["a"]
    gc.collect()
    assert shelf.load("d").name == "d"
    assert memory.bytes <= 3 * BYTES


def no_memory_beside(max_bytes: int, memory: WeightMemory[Adapter], patch: pytest.MonkeyPatch):
    """A device without memory for an adapter beside others of more bytes."""
    placed = adapter_file._placed

    def on_device(*arguments: Any) -> torch.Tensor:
        if memory.bytes > max_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return placed(*arguments)

    patch.setattr(adapter_file, "_placed", on_device)


def test_an_adapter_that_nobody_uses_makes_room_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a", "b")
    shelf, memory = shelved(tmp_path)
    no_memory_beside(0, memory, monkeypatch)
    shelf.load("a")
    used = shelf.load("b")
    assert memory.bytes == used.nbytes == BYTES


def test_an_adapter_for_which_the_device_has_no_memory_may_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a")
    shelf, memory = shelved(tmp_path)
    no_memory_beside(-1, memory, monkeypatch)
    says = f"^adapter 'a' needs {BYTES} bytes of memory, which are not free now; try again in 5 s.$"
    with pytest.raises(Overloaded, match=says):
        shelf.load("a")


def test_a_dora_needs_the_weight_of_a_layer_beside_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, metadata = files.peft({"unet": changes(NETWORK, 2)})
    tensors["unet.mid.lora_magnitude_vector"] = torch.ones(5)
    files.saved((tensors, metadata), tmp_path / "dora.safetensors")
    shelf, memory = shelved(tmp_path, max_bytes=10 * BYTES)
    [dora] = shelf.available()
    assert dora.nbytes(torch.float32) == BYTES + 4 * (4 * 5)
    no_memory_beside(-1, memory, monkeypatch)
    with pytest.raises(Overloaded, match=f"needs {BYTES + 4 * (4 * 5) + 4 * (5 * 6)} bytes"):
        shelf.load("dora")


def test_an_adapter_that_could_never_be_held_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "large", rank=8)
    shelf, _ = shelved(tmp_path)
    assert shelf.available() == ()
    with pytest.raises(
        AdapterMismatch, match=f"takes {4 * BYTES} bytes .* {3 * BYTES} are allowed"
    ):
        shelf.find("large")
