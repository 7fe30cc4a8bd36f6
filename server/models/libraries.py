"""Imports transformers and diffusers without optional packages that would be loaded needlessly."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final, cast

__all__ = ["import_libraries"]

OPTIONAL_PACKAGES: Final = ("bitsandbytes", "gguf", "torchao")
"""``server.models.quantized`` imports the first and the last itself, only where it quantizes
weights; ``server.models.gguf`` reads its files without the package."""


def import_libraries() -> None:
    """Import both libraries as if the packages for quantization were not installed.

    diffusers imports torchao wherever it is installed, which takes a second and logs warnings about
    other devices at every start. The packages can still be imported afterwards, and those imported
    already are left alone.
    """
    modules = cast("dict[str, Any]", sys.modules)
    hidden = [name for name in OPTIONAL_PACKAGES if name not in modules]
    # An entry of None makes a package look as if it were not installed.
    modules.update(dict.fromkeys(hidden))
    try:
        found = import_module("transformers.utils")
        # Each function caches its answer.
        found.is_torchao_available()
        found.is_bitsandbytes_available()
        import_module("diffusers.utils")
    finally:
        for name in hidden:
            del modules[name]
