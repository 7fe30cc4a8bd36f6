"""How many processes may compile at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from server.models.compiling import room
from server.models.memory import HOST, DeviceMemory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("cores", "quota", "processes"),
    [
        (1, "max 100000", 1),
        (2, "", 1),
        (16, "max 100000", 8),
        (16, "450000 100000", 2),
        (64, "", 8),
        (64, "50000 100000", 1),
    ],
)
def test_half_of_the_cores_compile_and_no_more_than_a_container_may_use(
    cores: int, quota: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(room, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert room.max_processes() == processes


def test_each_process_needs_memory_of_the_host_and_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {HOST: 4 * room.HOST_BYTES, "cuda": 2 * room.DEVICE_BYTES}
    monkeypatch.setattr(
        room, "measure", lambda device: DeviceMemory(free[device.type], free[device.type])
    )
    cpu, cuda = torch.device(HOST), torch.device("cuda", 0)
    assert [room.has_room(cpu, others) for others in (3, 4)] == [True, False]
    assert [room.has_room(cuda, others) for others in (1, 2)] == [True, False]
