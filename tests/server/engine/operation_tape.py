"""Records and replays a forward on a CPU as a CUDA graph does on a GPU.

All operations of the forward are recorded with the memory that they read and write, and repeated
on that memory, without Python in between and with every number that the host passed at the time of
recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.operands import tensors_in


class Operations(TorchDispatchMode):
    """Records all operations of a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.written.append((func, args, kwargs or {}, tensors_in(made)))
        return made

    @property
    def names(self) -> set[str]:
        """Names of the operations."""
        return {func.overloadpacket.__name__ for func, *_ in self.written}

    def repeat(self) -> None:
        """Repeat the operations, each into the memory that it wrote to before."""
        for func, args, kwargs, before in self.written:
            for old, new in zip(before, tensors_in(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Repeated:
    """A forward that is repeated operation by operation."""

    def __init__(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> None:
        self.released = False
        self.calls = 0
        self._given = [one.clone() for one in given]
        self._operations = Operations()
        with self._operations:
            self._raw = evaluate(*self._given)

    def __call__(self, *given: Tensor) -> Tensor:
        """The forward's outputs for other input tensors."""
        assert not self.released
        self.calls += 1
        for mine, theirs in zip(self._given, given, strict=True):
            mine.copy_(theirs)
        self._operations.repeat()
        return self._raw.clone()

    def release(self) -> None:
        """Let go of its memory."""
        self.released = True
        del self._raw, self._given, self._operations


class OperationTape:
    """Records forwards on a CPU, as ``CudaRecorder`` does on a GPU."""

    def __init__(self) -> None:
        self.made: list[Repeated] = []

    @property
    def nbytes(self) -> int:
        return sum(not one.released for one in self.made)

    def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
        forward()
        return room > 0

    def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> Repeated:
        self.made.append(Repeated(evaluate, given))
        return self.made[-1]

    def reset_pool(self) -> None: ...
