"""Finds what a forward does that a recording of its kernels could not repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.operands import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["unrepeatable"]

BY_VALUES = "index"
"""Of the names of operations that choose entries: by integers, or by bools whose number counts."""

COPIES = ("copy", "aten.to.")
"""Likewise of those that copy; in inference mode the second is not taken apart into the first."""


def unrepeatable(forward: Callable[[], object], device: torch.device) -> str | None:
    """Run a forward, and say why its kernels alone are not all of it; None where they are.

    A recording repeats kernels and copies on the device. What the host reads from there, or sends
    there, would be as it was at the recording, and sizes that depend on values would be those.

    Args:
        forward: runs in the caller's thread.
        device: where all of it is to happen.
    """
    with _Operations(device) as seen:
        forward()
    return seen.obstacle


class _Operations(TorchDispatchMode):
    """Sees all operations of a thread, and keeps the first that cannot be repeated.

    Args:
        device: where they are to happen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.obstacle: str | None = None
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.obstacle is None:
            self.obstacle = self._obstacle(func, (args, kwargs), result)
        return result

    def _obstacle(self, func: Any, given: Any, result: Any) -> str | None:
        read, made = tensors_in(given), tensors_in(result)
        if torch.Tag.data_dependent_output in func.tags:
            return f"{func} makes the host wait for a value"
        if torch.Tag.dynamic_output_shape in func.tags:
            chosen = {one.dtype for one in read[1:]}
            by_integers = BY_VALUES in str(func) and not chosen & {torch.bool, torch.uint8}
            if not by_integers:
                return f"{func} has a size that depends on values"
        places = {one.device.type for one in (*read, *made)}
        # A number that stands on the host may take part in an operation, but not be copied.
        sizeable = {one.device.type for one in read if one.ndim} | {one.device.type for one in made}
        if self._device.type in places and len(sizeable) > 1:
            return f"{func} copies between the host and the device"
        copies = any(part in str(func) for part in COPIES)
        if copies and len(places) > 1 and self._device.type in places:
            return f"{func} copies between the host and the device"
        return None
