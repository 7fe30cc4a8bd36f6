"""Files of textual inversion: which fit a model, and the errors for the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor
from typing_extensions import override

from server.errors import EmbeddingMismatch, Overloaded
from server.models.embeddings.embedding import Embedding
from server.models.embeddings.embedding_file import EmbeddingTarget
from server.models.embeddings.shelf import EmbeddingShelf
from server.models.weight_memory import WeightMemory

ONE = EmbeddingTarget("small", {"text_encoder": 4}, 6)
TWO = EmbeddingTarget("large", {"text_encoder": 4, "text_encoder_2": 5}, 6)
BYTES = 4 * 2 * 4
"""Size of two vectors of four numbers."""


def shelved(folder: Path, target: EmbeddingTarget, max_bytes: int = 2**20) -> EmbeddingShelf:
    memory = WeightMemory[Embedding](max_bytes, "embeddings")
    return EmbeddingShelf((folder,), target, memory, torch.device("cpu"), torch.float32)


def pair(first: int = 2, second: int = 2) -> dict[str, Tensor]:
    return {"clip_l": torch.ones(first, 4), "clip_g": torch.full((second, 5), 2.0)}


@pytest.mark.parametrize(
    ("tensors", "target", "count"),
    [
        ({"emb_params": torch.ones(2, 4)}, ONE, 2),
        ({"<cat-toy>": torch.ones(1, 4)}, ONE, 1),
        ({"<cat-toy>": torch.ones(4, dtype=torch.float16)}, ONE, 1),
        (pair(), TWO, 2),
        ({"text_encoders_0": torch.ones(2, 4), "text_encoders_1": torch.full((2, 5), 2.0)}, TWO, 2),
    ],
    ids=["automatic1111", "diffusers", "a single vector", "two encoders", "diffusers' trainers"],
)
def test_files_of_other_programs_are_read(
    tensors: dict[str, Tensor], target: EmbeddingTarget, count: int, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "ink.safetensors")
    shelf = shelved(tmp_path, target)
    assert [(one.name, one.vectors) for one in shelf.available()] == [("ink", count)]
    loaded = shelf.load("ink")
    shapes = {part: tuple(one.shape) for part, one in loaded.vectors.items()}
    assert shapes == {part: (count, width) for part, width in target.widths.items()}
    assert loaded.nbytes == shelf.find("ink").nbytes(torch.float32)
    if target is TWO:
        assert torch.equal(loaded.vectors["text_encoder_2"], torch.full((2, 5), 2.0))


@pytest.mark.parametrize(
    ("tensors", "target", "says"),
    [
        ({"emb_params": torch.ones(2, 7)}, ONE, r"shape \[2, 7\]; .*'small' needs a width of 4"),
        ({"emb_params": torch.ones(7, 4)}, ONE, "has 7 vectors; .*'small' have room for 6"),
        ({"emb_params": torch.ones(0, 4)}, ONE, "has 0 vectors"),
        ({"emb_params": torch.ones(1, 2, 4)}, ONE, r"shape \[1, 2, 4\]"),
        ({"emb_params": torch.ones(2, 4).int()}, ONE, "of type I32; allowed are F16, BF16"),
        (pair(), ONE, "has the tensors 'clip_g', 'clip_l'; model 'small' needs a single one"),
        ({"emb_params": torch.ones(2, 4)}, TWO, "model 'large' needs clip_l and clip_g"),
        (pair(2, 3), TWO, "not as many vectors for each text encoder"),
    ],
)
def test_a_file_that_does_not_fit_is_left_out_by_name_with_the_reason(
    tensors: dict[str, Tensor], target: EmbeddingTarget, says: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "ink.safetensors")
    shelf = shelved(tmp_path, target)
    assert shelf.available() == shelf.named_in("ink") == ()
    assert list(shelf.unfit()) == list(shelf.unfit_in("some ink")) == ["ink"]
    with pytest.raises(EmbeddingMismatch, match=rf"^embedding 'ink' .*{says}"):
        shelf.load("ink")


def test_other_files_are_no_embeddings_and_a_new_one_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "ink.pt").write_text("a pickle")
    (tmp_path / "torn.safetensors").write_text("no tensors")
    shelf = shelved(tmp_path, ONE)
    assert list(shelf.unfit()) == ["torn"]
    assert "not a readable safetensors file" in shelf.unfit()["torn"]
    assert str(tmp_path) not in shelf.unfit()["torn"]
    save_file({"emb_params": torch.ones(2, 4)}, tmp_path / "ink.safetensors")
    assert [one.name for one in shelf.named_in("an INK drawing")] == ["ink"]


class Counting(EmbeddingShelf):
    """Counts the files that it examines."""

    looks = 0

    @override
    def _is_one(self, path: Path) -> bool:
        self.looks += 1
        return super()._is_one(path)


def test_of_a_folder_that_has_not_changed_only_what_is_named_is_looked_at(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for folder in (tmp_path, own):
        folder.mkdir(exist_ok=True)
        for name in ("ink", "oil", "wax"):
            save_file({"emb_params": torch.ones(2, 4)}, folder / f"{name}.safetensors")
        os.utime(folder, (1, 1))
    memory = WeightMemory[Embedding](2**20, "embeddings")
    shelf = Counting((tmp_path, own), ONE, memory, torch.device("cpu"), torch.float32)
    assert shelf.named_in("a drawing") == ()
    assert [one.path for one in shelf.named_in("an ink drawing")] == [own / "ink.safetensors"]
    assert shelf.looks == 1
    (own / "ink.safetensors").unlink()
    (own / "tar.safetensors").mkdir()
    assert [one.path for one in shelf.named_in("ink, tar")] == [tmp_path / "ink.safetensors"]
    assert {one.name for one in shelf.available()} == {"ink", "oil", "wax"}


def test_values_that_are_no_numbers_are_refused_once_they_are_read(tmp_path: Path) -> None:
    save_file({"emb_params": torch.full((1, 4), torch.nan)}, tmp_path / "ink.safetensors")
    with pytest.raises(EmbeddingMismatch, match="'ink' has values that are not numbers in float32"):
        shelved(tmp_path, ONE).load("ink")


def test_what_is_loaded_stays_as_it_was_when_its_file_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    save_file({"emb_params": torch.ones(2, 4)}, file)
    loaded = shelved(tmp_path, ONE).load("ink")
    with file.open("r+b") as stream:
        stream.write(save({"emb_params": torch.full((2, 4), torch.nan)}))
    assert torch.equal(loaded.vectors["text_encoder"], torch.ones(2, 4))


def test_memory_is_bounded_by_bytes(tmp_path: Path) -> None:
    for name in ("ink", "oil"):
        save_file({"emb_params": torch.ones(2, 4)}, tmp_path / f"{name}.safetensors")
    shelf = shelved(tmp_path, ONE, max_bytes=BYTES)
    with pytest.raises(EmbeddingMismatch, match=f"take {2 * BYTES} bytes of memory together"):
        shelf.check_together(shelf.named_in("ink, oil"))
    held = shelf.load("ink")
    with pytest.raises(Overloaded):
        shelf.load("oil")
    del held
    assert shelf.load("oil").name == "oil"
