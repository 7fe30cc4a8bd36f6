"""Prefixes of a network's tensors in files that may hold other networks too; loads no library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["UNET", "own_prefix"]

UNET: Final = "model.diffusion_model."
PREFIXES: Final = (UNET, "diffusion_model.", "control_model.", "first_stage_model.")
"""Of a network within a file of several, or of a saved network's wrapper."""


def own_prefix(names: Collection[str], among: Sequence[str] = PREFIXES) -> str:
    """What the tensors of a file's network begin with, empty where they have no prefix.

    Args:
        names: of all tensors of the file.
        among: prefixes that it may have.
    """
    return next((one for one in among if any(name.startswith(one) for name in names)), "")
