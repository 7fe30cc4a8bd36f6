"""GGUF files of tiny denoisers, written with the package gguf in the form of published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

from server.models.gguf.formats import FORMATS

WITHIN = "model.diffusion_model."
SHAPE_OF = "comfy.gguf.orig_shape."
SCALES = {"Q4_K": {0: 4e-4, 2: 3e-3}, "Q6_K": {208: 5e-5}}
"""Offsets of K-quants' scales, with values that make random blocks resemble trained weights."""


def write(
    file: Path, tensors: Mapping[str, Tensor], *kinds: str, in_rows_of_256: bool = False
) -> None:
    """Write tensors as published tools do: large matrices in blocks, all others in float32.

    Args:
        file: file to write.
        tensors: tensors by name.
        kinds: kinds of the matrices, used in turn; matrices whose rows are not whole blocks are
            in float16.
        in_rows_of_256: whether weights whose rows are not whole blocks of 256 numbers are
            written in rows of 256, as for U-Nets, including convolutions.
    """
    writer = GGUFWriter(file, "tiny")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    matrices = 0
    for name, whole in tensors.items():
        tensor = whole
        odd = whole.ndim > 1 and whole.shape[-1] % 256 and not whole.numel() % 256
        if in_rows_of_256 and odd and whole.numel() >= 512:
            tensor = whole.reshape(-1, 256)
            writer.add_array(f"{SHAPE_OF}{name}", list(whole.shape))
        numbers: Any = tensor.float().numpy()
        kind = "F32"
        if name.endswith(".weight") and tensor.ndim == 2:
            kind = kinds[matrices % len(kinds)]
            matrices += 1
            if kind in FORMATS and tensor.shape[1] % FORMATS[kind].numbers:
                kind = "F16"
        if kind in SCALES:
            # Only llama.cpp can encode numbers in these, but any bytes are valid blocks.
            data = blocks(kind, *tensor.shape)
        else:
            data = quants.quantize(numbers, GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(kind: str, rows: int, numbers: int) -> Any:
    """Random rows of a kind in ``SCALES``."""
    form = FORMATS[kind]
    random = np.random.default_rng(rows)
    made = random.integers(0, 256, (rows, numbers // form.numbers, form.nbytes), dtype=np.uint8)
    for place, scale in SCALES[kind].items():
        made[..., place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    return made.reshape(rows, -1)


def restored(file: Path) -> dict[str, Tensor]:
    """All tensors in float32, as the package gguf reads them."""
    reader = gguf.GGUFReader(file)
    made: dict[str, Tensor] = {}
    for one in reader.tensors:
        field = reader.get_field(f"{SHAPE_OF}{one.name}")
        shape = tuple(one.shape)[::-1] if field is None else field.contents()
        numbers = quants.dequantize(one.data, one.tensor_type).reshape(shape)
        made[one.name] = torch.from_numpy(numbers.copy())
    return made
