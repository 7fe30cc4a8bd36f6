"""How much of the process's memory weights take that requests name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from server.models.weight_memory import WeightMemory

MIB = 2**20


@dataclass(frozen=True, eq=False)
class Weights:
    """A tensor that was made from others."""

    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def load() -> Weights:
    """Load as files are read, before their weights are converted."""
    read = [torch.ones(MIB) for _ in range(32)]
    return Weights(torch.cat([one[: MIB // 64] for one in read]))


def test_what_weights_were_read_from_is_given_back_to_the_system() -> None:
    memory: WeightMemory[Weights] = WeightMemory(8 * MIB, "weights")
    process = psutil.Process()
    before = process.memory_info().rss
    # The allocator keeps blocks of a size only after some were freed.
    kept = [memory.get((name, Path(), (0, 0)), 2 * MIB, load) for name in "ab"]
    assert process.memory_info().rss - before < 64 * MIB
    assert memory.bytes == sum(one.nbytes for one in kept)
