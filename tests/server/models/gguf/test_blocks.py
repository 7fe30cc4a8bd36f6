"""Blocks are decoded to the same numbers as by the package gguf and by diffusers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGMLQuantizationType, quants

from server.models.gguf.blocks import dequantized
from server.models.gguf.formats import FORMATS

ROWS, IN_A_ROW = 4, 3


def test_formats_are_those_of_ggml() -> None:
    for kind, form in FORMATS.items():
        code = GGMLQuantizationType[kind]
        assert (code, gguf.GGML_QUANT_SIZES[code]) == (form.code, (form.numbers, form.nbytes))


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_are_exact_in_float32_and_those_of_diffusers_in_sixteen_bits(kind: str) -> None:
    form = FORMATS[kind]
    code, width = GGMLQuantizationType[kind], IN_A_ROW * form.nbytes
    data = np.random.default_rng(0).integers(0, 256, (ROWS, width), dtype=np.uint8)
    rows = torch.from_numpy(data)
    with np.errstate(invalid="ignore"):
        expected = torch.from_numpy(quants.dequantize(data, code))
    ours = dequantized(rows, kind, torch.float32)
    assert ours.shape == (ROWS, IN_A_ROW * form.numbers)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    blocks = rows.reshape(-1, form.nbytes)
    theirs = dequantize_functions[code](blocks, form.numbers, form.nbytes).reshape(ours.shape)
    for dtype in (torch.float16, torch.bfloat16):
        made = dequantized(rows, kind, dtype)
        torch.testing.assert_close(made, theirs.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", FORMATS)
def test_cuda_graphs_record_how_numbers_are_restored(kind: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, (ROWS, FORMATS[kind].nbytes), dtype=np.uint8)
    rows = torch.from_numpy(data)
    on_device = rows.cuda()
    dequantized(on_device, kind, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = dequantized(on_device, kind, torch.bfloat16)
    graph.replay()
    expected = dequantized(rows, kind, torch.bfloat16)
    torch.testing.assert_close(recorded.cpu(), expected, rtol=0, atol=0, equal_nan=True)
