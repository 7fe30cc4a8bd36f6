"""A count of device operations, which is the same on every machine."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import ParamSpec, override

from server.engine.operands import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OperationCount"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class OperationCount(TorchDispatchMode):
    """Counts the operations of a thread that compute or copy something, and so not views.

    On a GPU each of them is a kernel launch or a copy. On a CPU, transfers to the device are not
    counted, as the data is there already.

    Attributes:
        total: number of operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._apart = False

    def leaving_out(self, work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Wrap a function so that its operations are not counted."""

        @wraps(work)
        def apart(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            self._apart = True
            try:
                return work(*args, **kwargs)
            finally:
                self._apart = False

        return apart

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._apart:
            # A new tensor made from numbers is detached in place, which writes nothing.
            written = func._schema.is_mutable and func is not torch.ops.aten.detach_.default
            self.total += written or not _memory(made) <= _memory((args, kwargs))
        return made


def _memory(given: Any) -> set[int]:
    """Addresses of the storages of all tensors in a structure; empty tensors have none."""
    return {one.untyped_storage().data_ptr() for one in tensors_in(given) if one.numel()}
