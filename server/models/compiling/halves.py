"""Makes splitting a tensor with two entries per row traceable for any number of rows.

``torch.chunk`` returns fewer chunks than requested if there are too few entries, so a graph that
contains it fits only the number of rows it was traced with. Two entries a row can always be halved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["HalvedRows"]


class HalvedRows(TorchFunctionMode):
    """While a block is traced, replaces ``chunk`` into two by slices where the length is dynamic.

    The length must be even.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in {torch.chunk, Tensor.chunk}:
            tensor, count, dim = _given(*args, **kwargs)
            entries: Any = tensor.shape[dim]
            if isinstance(entries, torch.SymInt) and count == 2 and entries % 2 == 0:
                half = entries // 2
                return tensor.narrow(dim, 0, half), tensor.narrow(dim, half, half)
        return func(*args, **kwargs)


def _given(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, int, int]:  # noqa: A002
    return input, chunks, dim
