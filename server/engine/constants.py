"""Finds the tensors that a forward reads beside those that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.operands import tensors_in

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Constants"]


class Constants(TorchDispatchMode):
    """Sees all operations of a thread, and keeps alive what they read and none of them made.

    A recording reads these tensors where they were when it was made: weights, but also what a
    network computes once for a size and lets go of when it has kept many others since.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()
        self._read: dict[int, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """One of each memory that was read."""
        return [*self._read.values()]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for one in tensors_in((args, kwargs)):
            memory = _memory(one)
            if memory not in self._made:
                self._read.setdefault(memory, one)
        result = func(*args, **(kwargs or {}))
        # A view of what was read is none that was made.
        self._made |= {_memory(one) for one in tensors_in(result)} - self._read.keys()
        return result


def _memory(tensor: Tensor) -> int:
    # Tensors of other classes, such as quantised weights, may have their memory in several others.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor.untyped_storage().data_ptr() if plain else id(tensor)
