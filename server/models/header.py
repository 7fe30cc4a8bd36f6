"""Reads tensor shapes from a safetensors header before any tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["shapes_of"]

DTYPES: Final = ("F16", "BF16", "F32", "F64")
SHOWN: Final = 80
"""Maximum characters of a tensor's name shown in a message, as a file may contain anything."""


def shapes_of(
    opened: Any, names: Iterable[str], refusal: Callable[[str], Exception]
) -> dict[str, tuple[int, ...]]:
    """Shapes of floating-point tensors by name.

    Args:
        opened: file opened by ``safetensors.safe_open``.
        names: names of the tensors.
        refusal: creates the exception that is raised for a tensor of another dtype, from a clause.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        entry = opened.get_slice(name)
        if (dtype := entry.get_dtype()) not in DTYPES:
            raise refusal(
                f"has the tensor {name[:SHOWN]} of type {dtype}; allowed are {', '.join(DTYPES)}"
            )
        shapes[name] = tuple(entry.get_shape())
    return shapes
