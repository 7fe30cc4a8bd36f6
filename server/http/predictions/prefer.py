"""The header `Prefer` (RFC 7240): whether and how long a client waits for its job."""

from __future__ import annotations

import re
from typing import Final

from server.errors import InvalidRequest

__all__ = ["MAX_WAIT_S", "waiting_s"]

MAX_WAIT_S: Final = 60
"""Seconds of `wait` without a number, and its maximum."""

_WAIT: Final = re.compile(r"wait(?:\s*=\s*\"?(\d{1,6})\"?)?", re.IGNORECASE)


def waiting_s(prefer: str) -> float:
    """Return the seconds that the response waits for the job's end; 0 to respond at once.

    Args:
        prefer: value of the header, empty without one; other preferences are ignored.

    Raises:
        InvalidRequest: `wait` has a value that is not a number of seconds, is repeated, or is
            combined with `respond-async`.
    """
    preferences = [part.partition(";")[0].strip() for part in prefer.split(",")]
    waits = [one for one in preferences if one.lower().startswith("wait")]
    if not waits:
        return 0.0
    match = _WAIT.fullmatch(waits[0])
    if match is None or len(waits) > 1 or "respond-async" in map(str.lower, preferences):
        raise InvalidRequest(
            "prefer",
            f"prefer is {prefer[:60]!r}; allowed are wait, wait=SECONDS and respond-async.",
        )
    return float(min(MAX_WAIT_S, int(match[1]))) if match[1] else float(MAX_WAIT_S)
