"""The states of all images of a lane, in one preallocated tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FIRST_SLOTS = 4
"""State slots that the deepest of our own samplers needs; a deeper one makes the pool grow."""

FIRST_CAPACITY = 16


class Pool:
    """Rows of ``[K + 2, C, h, w]``: K state slots, then room for the prediction and fresh noise.

    The pool grows by doubling, up to as many images as the engine admits. If there is no memory to
    grow, it stays unchanged.

    Args:
        shape: shape of a latent, ``(C, h, w)``.
        device: device of the states.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.slots = FIRST_SLOTS
        self.columns = self._empty(FIRST_CAPACITY, self.slots + 2)
        self.rule_memory = self._empty(FIRST_CAPACITY, 0)
        self.policy_memory = self._empty(FIRST_CAPACITY, 0)
        self.cache_memory = self._empty(FIRST_CAPACITY, 0)
        self._free = list(range(FIRST_CAPACITY))

    @property
    def idle(self) -> bool:
        """Whether no image has a row."""
        return len(self._free) == len(self.columns)

    def take(
        self, slots: int, rule_slots: int = 0, policy_slots: int = 0, cache_slots: int = 0
    ) -> int:
        """Take a zeroed row for a plan of ``slots``, and memory of rule, policy and step cache.

        Raises:
            torch.OutOfMemoryError: there is no memory for another row.
        """
        self._grow(slots, rule_slots, policy_slots, cache_slots)
        row = self._free[-1]
        # Required: a NaN left here would survive a coefficient of zero.
        for tensor in (self.columns, self.rule_memory, self.policy_memory, self.cache_memory):
            tensor[row].zero_()
        return self._free.pop()

    def release(self, row: int) -> None:
        """Return the row of an image that is done."""
        self._free.append(row)

    def _grow(self, slots: int, rule_slots: int, policy_slots: int, cache_slots: int) -> None:
        count = len(self.columns)
        rows = count if self._free else 2 * count
        deepest = max(slots, self.slots)
        # All are allocated before any is replaced, since each allocation may fail.
        columns = self._grown(self.columns, rows, deepest + 2, kept=self.slots)
        rule_memory = self._grown(self.rule_memory, rows, rule_slots)
        policy_memory = self._grown(self.policy_memory, rows, policy_slots)
        cache_memory = self._grown(self.cache_memory, rows, cache_slots)
        self.columns, self.rule_memory, self.policy_memory = columns, rule_memory, policy_memory
        self.cache_memory = cache_memory
        self.slots = deepest
        self._free.extend(range(count, rows))

    def _grown(self, old: Tensor, rows: int, slots: int, kept: int | None = None) -> Tensor:
        """Grow to at least these rows and slots, keeping the first ``kept`` slots."""
        slots = max(slots, old.shape[1])
        if (rows, slots) == old.shape[:2]:
            return old
        new = self._empty(rows, slots)
        new[: len(old), : old.shape[1]][:, :kept] = old[:, :kept]
        return new

    def _empty(self, rows: int, slots: int) -> Tensor:
        return torch.zeros(rows, slots, *self.shape, device=self.device)
