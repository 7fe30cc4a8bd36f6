"""Which rows run in the next tick: pure, touches no device."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        group: images of one group run in the same ticks or not at all; None is of none.
    """

    rows: int
    remaining: int
    age: int
    priority: Priority
    lane: int
    group: int | None = None


def select(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """The candidates of the next tick: all of one lane, within the row budget.

    Shortest remaining work first, which gives the least mean latency, with ageing against
    starvation. The first in this order always runs and decides the lane; later ones fill what
    room is left, a smaller one where a larger does not fit.

    Args:
        candidates: every image under way, oldest first.
        budget: rows of a forward, at least as many as any one candidate or group needs.

    Returns:
        Indices into ``candidates``, in order of urgency, those of a group side by side.
    """
    units, members = _units(candidates)
    order = sorted(range(len(units)), key=lambda i: _urgency(units[i]))
    chosen: list[int] = []
    left = budget
    for i in order:
        unit = units[i]
        if unit.rows <= left and unit.lane == units[order[0]].lane:
            chosen.extend(members[i])
            left -= unit.rows
            if left == 0:
                break
    return chosen


def _units(
    candidates: Sequence[Candidate],
) -> tuple[Sequence[Candidate], Sequence[Sequence[int]]]:
    """The candidates with each group as one, and the indices that each of them stands for."""
    alone = [(i,) for i in range(len(candidates))]
    if all(candidate.group is None for candidate in candidates):
        return candidates, alone
    members: dict[tuple[int | None, int], list[int]] = {}
    for i, candidate in enumerate(candidates):
        key = (None, i) if candidate.group is None else (candidate.group, 0)
        members.setdefault(key, []).append(i)
    units: list[Candidate] = []
    for indices in members.values():
        own = [candidates[i] for i in indices]
        units.append(
            replace(
                own[0],
                rows=sum(one.rows for one in own),
                remaining=sum(one.remaining for one in own),
                age=max(one.age for one in own),
                priority=min(one.priority for one in own),
            )
        )
    return units, list(members.values())


def _urgency(candidate: Candidate) -> float:
    return candidate.remaining + HEAD_START[candidate.priority] - AGEING * candidate.age
