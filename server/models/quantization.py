"""The available quantizations of weights, and their requirements."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BITS", "MIN_FEATURES", "Quantization", "fetches_code", "missing_package"]

Quantization: TypeAlias = Literal["none", "int8", "fp8", "nf4"]
"""``int8`` and ``fp8`` (e4m3) have a scale for each row of a matrix; ``nf4`` is QLoRA's
four-bit type (arXiv 2305.14314, section 3), with a scale for each 64 weights."""

PACKAGES: Final[Mapping[str, str]] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}

BITS: Final[Mapping[str, float]] = {"int8": 8.0, "fp8": 8.0, "nf4": 4.5}
"""Bits per weight, including scales for ``nf4``; the scales of rows are negligible."""

MIN_FEATURES: Final = 64
"""Minimum number of inputs and outputs of a quantized layer; smaller ones are not worth it."""


def missing_package(kind: str) -> str | None:
    """The package that a quantization needs and that is not installed; None if none is missing."""
    package = PACKAGES.get(kind)
    return package if package is not None and find_spec(package) is None else None


def fetches_code(kind: str) -> bool:
    """Whether its package would download code from a hub, as bitsandbytes does with ``kernels``."""
    return PACKAGES.get(kind) == "bitsandbytes" and find_spec("kernels") is not None
