"""Detection of the tensors that a forward pass reads besides its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.operands import tensors_in

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Constants"]


class Constants(TorchDispatchMode):
    """Watches a thread's operations, and keeps alive the tensors that they read but did not make.

    A recording reads these tensors at the addresses that they had at capture. They are weights, but
    also tensors that a network computes once per size, and drops after it has cached many others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()
        self._read: dict[int, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """One tensor per memory that was read."""
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
        # A view of a tensor that was read does not count as made.
        self._made |= {_memory(one) for one in tensors_in(result)} - self._read.keys()
        return result


def _memory(tensor: Tensor) -> int:
    # Tensors of other classes, such as quantized weights, may keep their data in several others.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor.untyped_storage().data_ptr() if plain else id(tensor)
