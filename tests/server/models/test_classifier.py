"""The file of a classifier of latents."""

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.errors import ModelMismatch
from server.models.classifier import FORMAT, LatentClassifier

HEADS = {"shape": ("circle", "star"), "colour": ("red", "green", "blue")}


def test_a_file_gives_back_the_classifier_in_half_precision(
    tmp_path: Path, mode_of_files: int
) -> None:
    made = LatentClassifier(4, HEADS, "0123456789abcdef")
    file = tmp_path / "weft" / "classifier.safetensors"
    made.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == mode_of_files
    read = LatentClassifier.load(file)
    assert (read.channels, read.heads, read.model) == (4, HEADS, "0123456789abcdef")
    for name, value in made.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.half().float())
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_what_holds_no_classifier_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "classifier.safetensors"
    with pytest.raises(ModelMismatch, match="cannot be read"):
        LatentClassifier.load(file)
    save_file({"x": torch.zeros(3)}, file)
    with pytest.raises(
        ModelMismatch, match=r"contains no classifier in the format weft\.classifier\.1"
    ):
        LatentClassifier.load(file)
    for identity in ("[", "[" * 100_000, "5", '{"channels": 4, "heads": [], "model": ""}'):
        save_file({"x": torch.zeros(3)}, file, {"format": FORMAT, "identity": identity})
        with pytest.raises(ModelMismatch, match="cannot be read"):
            LatentClassifier.load(file)
