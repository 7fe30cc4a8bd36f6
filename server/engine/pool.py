"""The states of all images of a lane, in one preallocated tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FIRST_SLOTS = 4
"""State slots that the deepest of our own samplers needs; more only for a deeper one."""

FIRST_CAPACITY = 16


class Pool:
    """Rows of ``[K + 2, C, h, w]``: K state slots, then room for the prediction and fresh noise.

    Grows by doubling, up to as many images as the engine admits.

    Args:
        shape: of a latent, ``(C, h, w)``.
        device: where the states live.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.slots = FIRST_SLOTS
        self._memory_slots = 0
        self.columns = self._empty(FIRST_CAPACITY, self.slots + 2)
        self.memory = self._empty(FIRST_CAPACITY, 0)
        self._free = list(range(FIRST_CAPACITY))

    @property
    def idle(self) -> bool:
        """Whether no image has a row."""
        return len(self._free) == len(self.columns)

    def take(self, slots: int, memory_slots: int) -> int:
        """A zeroed row for a plan of ``slots`` and a rule of ``memory_slots``."""
        if slots > self.slots:
            self._deepen(slots)
        if memory_slots > self._memory_slots:
            extra = self._empty(len(self.memory), memory_slots - self._memory_slots)
            self.memory = torch.cat([self.memory, extra], 1)
            self._memory_slots = memory_slots
        if not self._free:
            self._double()
        row = self._free.pop()
        # Not only for tidiness: a NaN left here would survive a coefficient of zero.
        self.columns[row].zero_()
        self.memory[row].zero_()
        return row

    def give_back(self, row: int) -> None:
        """The image of this row is done."""
        self._free.append(row)

    def _empty(self, rows: int, slots: int) -> Tensor:
        return torch.zeros(rows, slots, *self.shape, device=self.device)

    def _double(self) -> None:
        count = len(self.columns)
        self.columns = torch.cat([self.columns, self._empty(count, self.slots + 2)])
        self.memory = torch.cat([self.memory, self._empty(count, self._memory_slots)])
        self._free.extend(range(count, 2 * count))

    def _deepen(self, slots: int) -> None:
        deeper = self._empty(len(self.columns), slots + 2)
        deeper[:, : self.slots] = self.columns[:, : self.slots]
        self.columns, self.slots = deeper, slots
