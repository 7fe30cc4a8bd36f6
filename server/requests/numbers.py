"""Strict types for numbers in requests, which are not converted from strings or other types."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["Count", "Share"]

Count = Annotated[int, Field(strict=True)]

Share = Annotated[float, Field(ge=0, le=1, strict=True)]
"""Position in a run: 0 is its beginning and 1 its end."""
