"""Prefixes of a network's tensors in files with several networks; imports no library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["UNET", "own_prefix"]

UNET: Final = "model.diffusion_model."
PREFIXES: Final = (UNET, "diffusion_model.", "control_model.", "first_stage_model.")
"""Prefixes of a network within a file of several, or within a wrapper that was saved with it."""


def own_prefix(names: Collection[str], among: Sequence[str] = PREFIXES) -> str:
    """The prefix of the network's tensors in a file; empty where they have none.

    Args:
        names: names of all tensors of the file.
        among: possible prefixes.
    """
    return next((one for one in among if any(name.startswith(one) for name in names)), "")
