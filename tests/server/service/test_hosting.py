"""How a model is kept follows from the memory that its device has."""

from __future__ import annotations

import pytest
import torch

from embedded import MODEL_FOLDER
from server.models.placement import Offload, Placement
from server.models.weight_files import bytes_in_memory
from server.models.weight_memory import WeightMemory
from server.service import hosting
from server.settings import Settings


def folders(settings: Settings) -> hosting._Folders:
    first = {"one": MODEL_FOLDER, "two": MODEL_FOLDER}
    return hosting._Folders(settings, first, WeightMemory(0, "a"), WeightMemory(0, "c"))


def needed(offload: Offload) -> int:
    return bytes_in_memory(MODEL_FOLDER, torch.float16, Placement(offload=offload))


def test_a_model_that_does_not_fit_on_a_gpu_is_streamed_and_counted_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(hosting, "attainable_bytes", lambda _: needed("none"))
    assert folders(Settings()).placement("one") == Placement()
    # The operator may allow less than there is.
    less = (needed("none") - 1) / 2**30
    small = folders(Settings(memory_gib=less))
    assert small.placement("one") == Placement(offload="all")
    assert small.bytes_of("one") == needed("all") < needed("none")
    told_not_to = folders(Settings(memory_gib=less, offload="none"))
    assert told_not_to.bytes_of("one") == needed("none")


def test_each_model_is_kept_in_the_bits_that_are_chosen_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.settings.missing_package", {}.get)
    chosen = folders(Settings(quantize=("int8", "two=none"), device="cpu"))
    assert chosen.placement("one") == Placement("int8")
    assert chosen.placement("two") == Placement()
    assert chosen.bytes_of("one") < chosen.bytes_of("two")
