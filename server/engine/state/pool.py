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
        self.columns = self._empty(FIRST_CAPACITY, self.slots + 2)
        self.rule_memory = self._empty(FIRST_CAPACITY, 0)
        self.policy_memory = self._empty(FIRST_CAPACITY, 0)
        self._free = list(range(FIRST_CAPACITY))

    @property
    def idle(self) -> bool:
        """Whether no image has a row."""
        return len(self._free) == len(self.columns)

    def take(self, slots: int, rule_slots: int = 0, policy_slots: int = 0) -> int:
        """A zeroed row for a plan of ``slots``, and memory of rule and policy."""
        if slots > self.slots:
            self._deepen(slots)
        self.rule_memory = self._widened(self.rule_memory, rule_slots)
        self.policy_memory = self._widened(self.policy_memory, policy_slots)
        if not self._free:
            self._double()
        row = self._free.pop()
        # Not only for tidiness: a NaN left here would survive a coefficient of zero.
        for tensor in (self.columns, self.rule_memory, self.policy_memory):
            tensor[row].zero_()
        return row

    def give_back(self, row: int) -> None:
        """The image of this row is done."""
        self._free.append(row)

    def _empty(self, rows: int, slots: int) -> Tensor:
        return torch.zeros(rows, slots, *self.shape, device=self.device)

    def _widened(self, memory: Tensor, slots: int) -> Tensor:
        if slots <= memory.shape[1]:
            return memory
        return torch.cat([memory, self._empty(len(memory), slots - memory.shape[1])], 1)

    def _double(self) -> None:
        count = len(self.columns)
        self.columns = self._doubled(self.columns)
        self.rule_memory = self._doubled(self.rule_memory)
        self.policy_memory = self._doubled(self.policy_memory)
        self._free.extend(range(count, 2 * count))

    def _doubled(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, torch.zeros_like(rows)])

    def _deepen(self, slots: int) -> None:
        deeper = self._empty(len(self.columns), slots + 2)
        deeper[:, : self.slots] = self.columns[:, : self.slots]
        self.columns, self.slots = deeper, slots
