"""The tensors that an operation reads or returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["tensors_in"]


def tensors_in(given: Any) -> list[Tensor]:
    """All tensors in arguments or results of any nesting, in order."""
    return [one for one in tree_leaves(given) if isinstance(one, Tensor)]
