"""The formats of blocks of quantised numbers, by ggml's names; loads no library.

A row of a matrix is a sequence of blocks, each with its own scales: 32 numbers in the older
formats and IQ4_NL, 256 in the others, whose scales are numbers of few bits with a scale of their
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FORMATS", "BlockFormat", "stays_in_blocks"]

FEWEST_CHANNELS: Final = 16
"""Of a convolution whose weight stays in blocks."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How large a block is.

    Attributes:
        code: of the type in a file.
        numbers: in a block.
        nbytes: of a block.
    """

    code: int
    numbers: int
    nbytes: int

    def row_bytes(self, numbers: int) -> int:
        """Bytes of a row of so many numbers, which are a multiple of those of a block."""
        return numbers // self.numbers * self.nbytes

    def row_numbers(self, nbytes: int) -> int:
        """Numbers in a row of so many bytes."""
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
"""The formats that are read."""


def stays_in_blocks(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor in blocks is kept so, as weights of linear layers and convolutions are.

    Args:
        name: of the tensor.
        shape: of its numbers.
    """
    # The first and the last convolution are small, and say how activations lie in memory.
    is_convolution = len(shape) == 4 and min(shape[:2]) >= FEWEST_CHANNELS
    return name.endswith(".weight") and (len(shape) == 2 or is_convolution)
