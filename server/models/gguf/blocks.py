"""Dequantizes blocks of quantized numbers, whose layouts are those of ggml's ``ggml-common.h``.

A torch version of ``gguf/quants.py`` of the package gguf. diffusers has such functions too, but
they copy constants from the host, which CUDA graphs cannot capture, and always round to float16.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from server.models.gguf.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["dequantized"]

NIBBLES: Final = (0, 4)
PAIRS: Final = (0, 2, 4, 6)
BITS: Final = tuple(range(8))

IQ4_LEVELS: Final = (
    *(-127, -104, -83, -65, -49, -35, -22, -10),
    *(1, 13, 25, 38, 53, 69, 89, 113),
)
"""``kvalues_iq4nl`` of ggml: levels are denser near zero, where most weights are."""


def dequantized(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Dequantize rows of blocks to ``[..., numbers]``.

    Scales are stored in float16. For 16-bit dtypes the products are computed in float16, as in
    diffusers and ComfyUI; for float32 they are exact. Products with the levels of the IQ4 formats
    are computed in float32, as in diffusers.

    Args:
        rows: bytes of whole blocks, ``[..., nbytes]`` uint8.
        kind: format of the blocks, a name in ``FORMATS``.
        dtype: dtype of the result.
    """
    form = FORMATS[kind]
    work = torch.float16 if dtype.itemsize < torch.float32.itemsize else torch.float32
    values = VALUES[kind](rows.reshape(-1, form.nbytes), work)
    return values.reshape(*rows.shape[:-1], form.row_numbers(rows.shape[-1])).to(dtype)


def _q4_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, quants = _split(blocks, 2, 16)
    return _half(d, dtype) * (_bits(quants, 16, NIBBLES).to(dtype) - 8)


def _q4_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, m, quants = _split(blocks, 2, 2, 16)
    return _half(d, dtype) * _bits(quants, 16, NIBBLES).to(dtype) + _half(m, dtype)


def _q5_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, high, quants = _split(blocks, 2, 4, 16)
    fives = _bits(quants, 16, NIBBLES) | _bits(high, 1, BITS) << 4
    return _half(d, dtype) * (fives.to(dtype) - 16)


def _q5_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, m, high, quants = _split(blocks, 2, 2, 4, 16)
    fives = _bits(quants, 16, NIBBLES) | _bits(high, 1, BITS) << 4
    return _half(d, dtype) * fives.to(dtype) + _half(m, dtype)


def _q8_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, quants = _split(blocks, 2, 32)
    return _half(d, dtype) * quants.view(torch.int8).to(dtype)


def _q2_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales, quants, d, least = _split(blocks, 16, 64, 2, 2)
    scale = _half(d, dtype) * (scales & 15).to(dtype)
    offset = _half(least, dtype) * (scales >> 4).to(dtype)
    return _scaled(_bits(quants, 32, PAIRS).to(dtype), scale, offset)


def _q3_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    high, quants, scales, d = _split(blocks, 32, 64, 12, 2)
    low = _bits(scales[:, :8], 8, NIBBLES)
    sixes = low | _bits(scales[:, 8:], 4, PAIRS) << 4
    scale = _half(d, dtype) * (sixes.to(dtype) - 32)
    # If the third bit is set, nothing is subtracted.
    threes = _bits(quants, 32, PAIRS) | _bits(high, 32, BITS) << 2
    return _scaled(threes.to(dtype) - 4, scale)


def _q4_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, least, packed, quants = _split(blocks, 2, 2, 12, 128)
    scales, offsets = _sixes(packed)
    scale, offset = _half(d, dtype) * scales.to(dtype), _half(least, dtype) * offsets.to(dtype)
    return _scaled(_bits(quants, 32, NIBBLES).to(dtype), scale, offset)


def _q5_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, least, packed, high, quants = _split(blocks, 2, 2, 12, 32, 128)
    scales, offsets = _sixes(packed)
    scale, offset = _half(d, dtype) * scales.to(dtype), _half(least, dtype) * offsets.to(dtype)
    fives = _bits(quants, 32, NIBBLES) | _bits(high, 32, BITS) << 4
    return _scaled(fives.to(dtype), scale, offset)


def _q6_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    low, high, scales, d = _split(blocks, 128, 64, 16, 2)
    scale = _half(d, dtype) * scales.view(torch.int8).to(dtype)
    sixes = _bits(low, 64, NIBBLES) | _bits(high, 32, PAIRS) << 4
    return _scaled(sixes.to(dtype) - 32, scale)


def _iq4_nl(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, quants = _split(blocks, 2, 16)
    return _half(d, dtype) * _levels(_bits(quants, 16, NIBBLES))


def _iq4_xs(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, high, low, quants = _split(blocks, 2, 2, 4, 128)
    sixes = _bits(low, 1, NIBBLES) | _bits(high, 1, PAIRS) << 4
    scale = _half(d, dtype) * (sixes.to(dtype) - 32)
    return _scaled(_levels(_bits(quants, 16, NIBBLES)), scale)


VALUES: Final[Mapping[str, Callable[[Tensor, torch.dtype], Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
"""Functions from bytes ``[blocks, nbytes]`` to ``[blocks, numbers]``, computed in a given dtype."""


def _split(blocks: Tensor, *widths: int) -> Sequence[Tensor]:
    return torch.split(blocks, list(widths), dim=1)


def _half(entry: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert the two bytes of a float16 number, ``[blocks, 2]``, to ``[blocks, 1]``."""
    return entry.view(torch.float16).to(dtype)


def _bits(packed: Tensor, run: int, shifts: Sequence[int]) -> Tensor:
    """Unpack ``[blocks, bytes]`` to small numbers ``[blocks, bytes * len(shifts)]``.

    Within a run of bytes, the numbers at the first shift come first, then those at the second.
    """
    width = 8 // len(shifts)
    runs = packed.unflatten(1, (-1, run))
    parts = [runs >> shift & (1 << width) - 1 for shift in shifts]
    return torch.stack(parts, dim=2).flatten(1)


def _sixes(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack eight scales and offsets of six bits, each ``[blocks, 8]``, from twelve bytes."""
    scales, offsets, rest = _split(packed, 4, 4, 4)
    return (
        torch.cat([scales & 63, rest & 15 | scales >> 2 & 48], dim=1),
        torch.cat([offsets & 63, rest >> 4 | offsets >> 2 & 48], dim=1),
    )


def _levels(quants: Tensor) -> Tensor:
    """Look up the IQ4 levels of four-bit numbers; float32 of the same shape."""
    levels = _levels_on(quants.device)
    return levels.index_select(0, quants.flatten().int()).view(quants.shape)


@cache
def _levels_on(device: torch.device) -> Tensor:
    """Levels on a device; cached, as a CUDA graph cannot copy from the host."""
    return torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=device)


def _scaled(quants: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """``scale * quant - offset``, where each scale applies to a run of numbers."""
    runs = quants.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]
    return (runs if offsets is None else runs - offsets[:, :, None]).flatten(1)
