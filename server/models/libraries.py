"""Imports transformers and diffusers without packages that they would load for nothing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final, cast

__all__ = ["import_libraries"]

UNUSED: Final = ("bitsandbytes", "gguf", "torchao")
"""``server.models.quantized`` calls the first and the last itself, only where it quantizes weights;
``server.models.gguf`` reads its files by itself."""


def import_libraries() -> None:
    """Import both libraries as if the packages that quantize weights were not installed.

    diffusers imports torchao wherever it is installed, which takes a second and writes warnings
    about its other devices at every start. Others can import these packages afterwards, and what is
    imported already is not touched.
    """
    modules = cast("dict[str, Any]", sys.modules)
    hidden = [name for name in UNUSED if name not in modules]
    # An entry without a module reads as a package that is not installed.
    modules.update(dict.fromkeys(hidden))
    try:
        found = import_module("transformers.utils")
        # Each remembers its answer.
        found.is_torchao_available()
        found.is_bitsandbytes_available()
        import_module("diffusers.utils")
    finally:
        for name in hidden:
            del modules[name]
