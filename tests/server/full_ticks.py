"""Engines whose ticks are full, for tests of what images do to each other in a tick.

On a CPU a tick of twice the rows may take twice the time, and then the engine runs few at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch


def full_ticks() -> AbstractContextManager[Any]:
    """Within it, engines start as if ticks of all sizes took the same time."""
    return patch("server.engine.warmup.time_forwards", lambda _, most: {1: 0.01, most: 0.01})
