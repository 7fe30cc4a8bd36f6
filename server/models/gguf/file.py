"""Reads the tensors of a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from server.errors import ModelMismatch
from server.models.gguf.header import tensors_of
from server.models.gguf.layers import BlockRows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["load_gguf"]

DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_gguf(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, memory-mapped.

    Quantized tensors are :class:`BlockRows`.

    Raises:
        ModelMismatch: the file is not a GGUF file, or not supported.
    """
    described = tensors_of(file)
    size = file.stat().st_size
    try:
        mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise ModelMismatch(f"GGUF file {str(file)!r} cannot be mapped: {error}.") from None
    tensors: dict[str, Tensor] = {}
    for name, one in described.items():
        own = mapped[one.start : one.start + one.nbytes]
        if one.quantized:
            tensors[name] = BlockRows.of(own.reshape(one.stored_shape), one.kind, one.shape)
        else:
            tensors[name] = own.view(DTYPES[one.kind]).reshape(one.shape)
    return tensors
