"""The stream on which a GPU decodes pictures beside the ticks."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["on_decoder_stream"]


@contextmanager
def on_decoder_stream(device: torch.device) -> Generator[None]:
    """What is asked of a GPU inside is done beside the ticks, after all that was asked before.

    Args:
        device: of all models; on a CPU nothing happens beside anything.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
