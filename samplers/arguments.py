"""Checks of the numbers that callers of the library pass."""

from __future__ import annotations

import numpy as np


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """Check a count passed by a caller and return it as an int.

    Args:
        name: name of the argument, for the error message.
        value: the value passed.
        least: smallest value allowed.
        most: largest value allowed; None for no upper limit.

    Raises:
        ValueError: the value is not a whole number, below ``least`` or above ``most``.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        whole = int(value)
        if whole >= least and (most is None or whole <= most):
            return whole
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} is {value!r}; it must be a whole number {allowed}.")


def number(name: str, value: object) -> float:
    """Check a number passed by a caller or read from a file and return it as a float.

    Args:
        name: name of the argument, for the error message.
        value: the value passed.

    Raises:
        ValueError: the value is a string, a bool or anything else that is not a number, or an
            integer beyond the range of floats.
    """
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is a whole number that is too large.") from None
