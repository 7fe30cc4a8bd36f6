"""Detection of operations in a forward pass that a recording of its kernels cannot repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.operands import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["unrepeatable"]

BY_VALUES = "index"
"""Part of the names of operations that select by integers, or by bools whose count sets a size."""

COPIES = ("copy", "aten.to.")
"""Parts of the names of copies; inference mode does not decompose the second into the first."""


def unrepeatable(forward: Callable[[], object], device: torch.device) -> str | None:
    """Run a forward pass; return why its kernels alone would not reproduce it, or None.

    A recording repeats kernels and copies on the device. Values that the host reads from the
    device, or sends to it, would stay as they were at capture, and so would sizes that depend on
    values.

    Args:
        forward: function that runs the pass in the caller's thread.
        device: device on which all of it should happen.
    """
    with _Operations(device) as seen:
        forward()
    return seen.obstacle


class _Operations(TorchDispatchMode):
    """Watches all operations of a thread, and keeps the first one that cannot be repeated.

    Args:
        device: device on which they should happen.
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
        # A scalar on the host may be an operand, but must not be copied.
        sizeable = {one.device.type for one in read if one.ndim} | {one.device.type for one in made}
        if self._device.type in places and len(sizeable) > 1:
            return f"{func} copies between the host and the device"
        copies = any(part in str(func) for part in COPIES)
        if copies and len(places) > 1 and self._device.type in places:
            return f"{func} copies between the host and the device"
        return None
