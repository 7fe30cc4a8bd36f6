"""Checks of the numbers that callers of the library pass."""

from __future__ import annotations

import numpy as np


def whole_number(name: str, value: object, least: int) -> int:
    """A count that a caller gave, as an int.

    Args:
        name: of the argument, for the refusal.
        value: what was given for it.
        least: the smallest that is allowed.

    Raises:
        ValueError: it is not a whole number, or below ``least``.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
    return int(value)
