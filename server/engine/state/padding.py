"""Padding to a fixed number of rows, so that a row's bits do not depend on the other rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def padded(rows: Tensor, count: int | None) -> Tensor:
    """Repeat the first row until there are ``count``; return the rows unchanged if it is None."""
    if count is None or len(rows) == count:
        return rows
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])
