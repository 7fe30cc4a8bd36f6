"""The CUDA stream on which pictures are decoded concurrently with the ticks."""

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
    """Queue a GPU's work inside the ``with`` block on the decoder's stream, after all earlier work.

    Args:
        device: device of all models; on a CPU the block runs unchanged.
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
