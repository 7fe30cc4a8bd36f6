"""Which rows run in the next tick: pure, touches no device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Priority(IntEnum):
    """Who goes first; lower is sooner."""

    LIVE = 0
    INTERACTIVE = 1
    BATCH = 2


HEAD_START = {Priority.LIVE: -4000.0, Priority.INTERACTIVE: 0.0, Priority.BATCH: 1000.0}
"""A priority's lead, in evaluations; ageing overtakes it in the end, so that nothing starves."""

AGEING = 0.25
"""Evaluations of lead that a tick of age is worth."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image under way, as selection sees it.

    Attributes:
        rows: rows of the forward that its next stage needs.
        remaining: evaluations that it still needs in all.
        age: ticks since it arrived.
        priority: its class.
        lane: images of one lane can share a forward.
    """

    rows: int
    remaining: int
    age: int
    priority: Priority
    lane: int


def select(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """The candidates of the next tick: all of one lane, within the row budget.

    Shortest remaining work first, which gives the least mean latency, with ageing against
    starvation. The first in this order always runs and decides the lane; later ones fill what
    room is left, a smaller one where a larger does not fit.

    Args:
        candidates: every image under way, oldest first.
        budget: rows of a forward, at least as many as any one candidate needs.

    Returns:
        Indices into ``candidates``, in order of urgency.
    """
    order = sorted(range(len(candidates)), key=lambda i: _urgency(candidates[i]))
    chosen: list[int] = []
    left = budget
    for i in order:
        candidate = candidates[i]
        if candidate.rows <= left and candidate.lane == candidates[order[0]].lane:
            chosen.append(i)
            left -= candidate.rows
            if left == 0:
                break
    return chosen


def _urgency(candidate: Candidate) -> float:
    return candidate.remaining + HEAD_START[candidate.priority] - AGEING * candidate.age
