"""Asynchronous copies of tensors from the device to the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class HostCopy:
    """Copies of tensors on the CPU; on CUDA through pinned memory, without blocking the caller.

    Args:
        tensors: tensors on one device; on CUDA they are copied once the current stream has computed
            them.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = tensors
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._copies = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether ``fetch`` returns without waiting."""
        return self._event is None or self._event.query()

    def fetch(self) -> tuple[Tensor, ...]:
        """Return the copies, after waiting for the device if they have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
