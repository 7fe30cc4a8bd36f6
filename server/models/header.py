"""What a safetensors file says of its tensors before any of them is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["shapes_of"]

DTYPES: Final = ("F16", "BF16", "F32", "F64")
SHOWN: Final = 80
"""Letters of a tensor's name in a message; a file may say anything."""


def shapes_of(
    opened: Any, names: Iterable[str], refusal: Callable[[str], Exception]
) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors of real numbers by name.

    Args:
        opened: by ``safetensors.safe_open``.
        names: of the tensors.
        refusal: makes the exception that is raised where a tensor has another type, of a clause.
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
