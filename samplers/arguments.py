"""Checks of the numbers that callers of the library pass."""

from __future__ import annotations

import numpy as np


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """A count that a caller gave, as an int.

    Args:
        name: of the argument, for the refusal.
        value: what was given for it.
        least: the smallest that is allowed.
        most: the largest that is allowed; None allows any.

    Raises:
        ValueError: it is not a whole number, below ``least`` or above ``most``.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        whole = int(value)
        if whole >= least and (most is None or whole <= most):
            return whole
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} is {value!r}; it must be a whole number {allowed}.")


def number(name: str, value: object) -> float:
    """A number that a caller gave or a file holds, as a float.

    Args:
        name: of the argument, for the refusal.
        value: what was given for it.

    Raises:
        ValueError: it is a text, a truth value or anything else that is no number, or a whole
            number beyond the range of floats.
    """
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is a whole number that is too large.") from None
