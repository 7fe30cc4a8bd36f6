"""Which ordinary rows run in the next tick, and how many: pure, touches no device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Priority(IntEnum):
    """Who goes first; lower is sooner."""

    LIVE = 0
    INTERACTIVE = 1
    BATCH = 2


BATCH_DELAY = 1000.0
"""Evaluations by which interactive images go before batch ones. Ageing overtakes it after 4000
ticks, so that nothing starves; no ageing overtakes live images (``live_share.py``)."""

AGEING = 0.25
"""Evaluations of lead that a tick of age is worth."""

NEAR_BEST = 0.995
"""Share of the best throughput that is good enough, where fewer rows mean less latency."""

LONGEST_TICK_S = 2.0
"""Nobody joins or leaves during a tick, so none is meant to be longer."""

PROBED_EVERY = 16
"""Ticks from one trial of another size to the next, which keeps its estimated cost true."""


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
        stream: the live stream that it is a frame of; None is an ordinary image.
    """

    rows: int
    remaining: int
    age: int
    priority: Priority
    lane: int
    group: int | None = None
    stream: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What waits in the lane whose turn it is.

    Attributes:
        lane: its identity.
        rows: that all of its images want in their next stages.
        widest: of one image or group.
        live: whether images of live streams are under way, in this lane or another.
    """

    lane: int
    rows: int
    widest: int
    live: bool


def load_of(candidates: Sequence[Candidate]) -> Load | None:
    """The load of the lane that the most urgent ordinary image runs in; None if there is none."""
    units, _ = units_of(candidates)
    if not units:
        return None
    lane = min(units, key=urgency).lane
    rows = [unit.rows for unit in units if unit.lane == lane]
    return Load(lane, sum(rows), max(rows), live=False)


def rows_of_tick(
    load: Load, most: int, seconds: Callable[[int], float], longest_s: float, tick: int
) -> int:
    """How many rows the next tick is to have.

    All that waits is to be through its next stage soonest, in as many equal ticks as that takes;
    of sizes that do this about equally well, the smallest, as fewer rows mean a shorter tick. So
    a long queue gets the best throughput, and a short one runs together if that costs little.

    Args:
        load: what waits.
        most: rows that a tick may have.
        seconds: expected for a tick of so many rows.
        longest_s: seconds that a tick may take, where fewer rows can help it.
        tick: number of the tick; at every 16th another size is tried, if the queue is long.
    """
    options = [
        (rows, ticks, seconds(rows)) for rows, ticks in _equal_ticks(load.rows, load.widest, most)
    ]
    short = [option for option in options if option[2] <= longest_s] or options[-1:]
    soonest = min(ticks * each for _, ticks, each in short)
    rows = min(rows for rows, ticks, each in short if ticks * each <= soonest / NEAR_BEST)
    if tick % PROBED_EVERY == 0 and load.rows > 2 * rows:
        tried = rows * 2 if tick // PROBED_EVERY % 2 else rows // 2
        if load.widest <= tried <= most and seconds(tried) <= longest_s:
            return tried
    return rows


def _equal_ticks(waiting: int, widest: int, most: int) -> Iterator[tuple[int, int]]:
    """Rows of a tick and how many such ticks take in all that waits, from most rows to fewest."""
    rows = min(waiting, most)
    while rows > 0:
        ticks = -(-waiting // rows)
        even = -(-waiting // ticks)
        # Whole images: a size that ends inside one would leave it out.
        yield min(-(-even // widest) * widest, max(rows, widest)), ticks
        # Sizes closer than this differ by less than anything is known of them.
        rows = min(even - 1, even * 7 // 8)


def select(candidates: Sequence[Candidate], rows: int) -> list[int]:
    """The candidates of the next tick without live images: all of one lane, of about so many rows.

    Shortest remaining work first, which gives the least mean latency, with ageing against
    starvation. The first in this order always runs and decides the lane; later ones fill what
    room is left, a smaller one where a larger does not fit.

    Args:
        candidates: every image under way, oldest first.
        rows: of the forward; more only where the first needs more.

    Returns:
        Indices into ``candidates``, in order of urgency, those of a group side by side.
    """
    units, members = units_of(candidates)
    order = sorted(range(len(units)), key=lambda i: urgency(units[i]))
    chosen: list[int] = []
    left = rows
    for i in order:
        unit = units[i]
        if not chosen or (unit.rows <= left and unit.lane == units[order[0]].lane):
            chosen.extend(members[i])
            left -= unit.rows
    return chosen


def units_of(
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


def urgency(candidate: Candidate) -> float:
    """Of an ordinary image, in evaluations; lower goes first."""
    delay = BATCH_DELAY if candidate.priority is Priority.BATCH else 0.0
    return candidate.remaining + delay - AGEING * candidate.age
