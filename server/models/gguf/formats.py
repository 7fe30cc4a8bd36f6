"""The supported formats of quantized blocks, by ggml's names; imports no library.

A row of a matrix is a sequence of blocks, each with its own scales. A block has 32 numbers in the
older formats and IQ4_NL, and 256 in the others, whose scales are themselves numbers of few bits
with a common scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FORMATS", "BlockFormat", "stays_in_blocks"]

MIN_CHANNELS: Final = 16
"""Minimum number of channels of a convolution whose weight stays in blocks."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Code and size of a block format.

    Attributes:
        code: code of the type in a file.
        numbers: numbers per block.
        nbytes: bytes per block.
    """

    code: int
    numbers: int
    nbytes: int

    def row_bytes(self, numbers: int) -> int:
        """Bytes of a row of this many numbers, a multiple of those in a block."""
        return numbers // self.numbers * self.nbytes

    def row_numbers(self, nbytes: int) -> int:
        """Numbers in a row of this many bytes."""
        return nbytes // self.nbytes * self.numbers


FORMATS: Final[Mapping[str, BlockFormat]] = {
    "Q4_0": BlockFormat(2, 32, 18),
    "Q4_1": BlockFormat(3, 32, 20),
    "Q5_0": BlockFormat(6, 32, 22),
    "Q5_1": BlockFormat(7, 32, 24),
    "Q8_0": BlockFormat(8, 32, 34),
    "Q2_K": BlockFormat(10, 256, 84),
    "Q3_K": BlockFormat(11, 256, 110),
    "Q4_K": BlockFormat(12, 256, 144),
    "Q5_K": BlockFormat(13, 256, 176),
    "Q6_K": BlockFormat(14, 256, 210),
    "IQ4_NL": BlockFormat(20, 32, 18),
    "IQ4_XS": BlockFormat(23, 256, 136),
}
"""The supported formats."""


def stays_in_blocks(name: str, shape: Sequence[int]) -> bool:
    """Whether a quantized tensor stays in blocks, as do weights of linear layers and convolutions.

    Args:
        name: name of the tensor.
        shape: shape of its numbers.
    """
    # The first and last convolutions are small, and determine the memory format of activations.
    is_convolution = len(shape) == 4 and min(shape[:2]) >= MIN_CHANNELS
    return name.endswith(".weight") and (len(shape) == 2 or is_convolution)
