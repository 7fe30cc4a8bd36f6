"""What a tick chooses among: images, their urgency, and how many rows: pure, touches no device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from server.engine.client import ANY_FLOW, Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence


class Priority(IntEnum):
    """Who goes first; lower is sooner."""

    LIVE = 0
    INTERACTIVE = 1
    BATCH = 2


BATCH_WAIT_S = 600.0
"""Seconds after which a batch image counts as interactive, so that it does not starve; no waiting
makes an image count as live (``live_share.py``)."""

AGEING = 0.25
"""Seconds of lead that a second of age is worth: an image that takes the device for 3 s in all goes
before all later ones of its client and size once it is 12 s old, however short they are."""

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
        remaining: seconds of the device that it still needs in all.
        age: seconds since it arrived.
        priority: its class.
        lane: images of one lane can share a forward.
        group: images of one group run in the same ticks or not at all; None is of none.
        stream: the live stream that it is a frame of; None is an ordinary image.
        flow: whose it is, and which of its client's images cost the same.
    """

    rows: int
    remaining: float
    age: float
    priority: Priority
    lane: int
    group: int | None = None
    stream: int | None = None
    flow: Flow = ANY_FLOW


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


@dataclass(frozen=True, slots=True)
class LaneCosts:
    """What a lane's ticks cost and may cost.

    Attributes:
        most: rows that a tick may have.
        seconds: expected for a tick of so many rows.
        longest_s: that a tick may take, where fewer rows can help it.
        area: cells of a latent; the rows of a forward of several sizes cost those of the largest.
        mixes: equal for lanes of several sizes that can share a forward; None where none can.
        mixing: how many times as long a forward takes if it has smaller sizes as well.
    """

    most: int
    seconds: Callable[[int], float]
    longest_s: float
    area: int = 0
    mixes: Hashable = None
    mixing: float = 1.0

    def mixes_with(self, other: LaneCosts) -> bool:
        """Whether images of both lanes can share a forward."""
        return self.mixes is not None and self.mixes == other.mixes

    @property
    def seconds_a_row(self) -> float:
        """Of a row in the largest tick."""
        return self.seconds(self.most) / self.most


def rows_of_tick(
    load: Load, most: int, seconds: Callable[[int], float], longest_s: float, tick: int
) -> int:
    """How many rows the next tick is to have.

    All that waits is to be through its next stage soonest; of sizes that do this about equally
    well, the smallest, as fewer rows mean a shorter tick. What fits into one tick may run in one or
    in several equal ones. Where more waits, images whose stage has run want the next one before
    the last have run theirs, so that no tick is short of rows, and seconds by the row decide.

    Args:
        load: what waits.
        most: rows that a tick may have.
        seconds: expected for a tick of so many rows.
        longest_s: seconds that a tick may take, where fewer rows can help it.
        tick: number of the tick; at every 16th another size is tried, if the queue is long.
    """
    sizes = _equal_ticks(load.rows, load.widest) if load.rows <= most else _full_ticks(load, most)
    options = [(rows, ticks, seconds(rows)) for rows, ticks in sizes]
    short = [option for option in options if option[2] <= longest_s] or options[-1:]
    soonest = min(ticks * each for _, ticks, each in short)
    rows = min(rows for rows, ticks, each in short if ticks * each <= soonest / NEAR_BEST)
    if tick % PROBED_EVERY == 0 and load.rows > 2 * rows:
        tried = rows * 2 if tick // PROBED_EVERY % 2 else rows // 2
        if load.widest <= tried <= most and seconds(tried) <= longest_s:
            return tried
    return rows


def _equal_ticks(waiting: int, widest: int) -> Iterator[tuple[int, float]]:
    """Rows of a tick and how many such ticks take in all that waits, from most rows to fewest."""
    rows = waiting
    while rows > 0:
        ticks = -(-waiting // rows)
        even = -(-waiting // ticks)
        # Whole images: a size that ends inside one would leave it out.
        yield min(-(-even // widest) * widest, max(rows, widest)), ticks
        rows = _smaller(even)


def _full_ticks(load: Load, most: int) -> Iterator[tuple[int, float]]:
    """Likewise where more waits than that, as a share of ticks that are never short of rows."""
    rows = most
    while rows > 0:
        whole = max(rows // load.widest, 1) * load.widest
        yield whole, load.rows / whole
        rows = _smaller(min(rows, whole))


def _smaller(rows: int) -> int:
    """The next size to try: those closer differ by less than anything is known of them."""
    return min(rows - 1, rows * 7 // 8)


def fill(units: Sequence[Candidate], order: Iterable[int], rows: int) -> list[int]:
    """As many of some images as there is room for; a smaller one where a larger does not fit.

    Args:
        units: images and groups.
        order: indices of some of them, in the order of their turns.
        rows: that there is room for.

    Returns:
        Indices of those that have room, in their order.
    """
    chosen: list[int] = []
    for i in order:
        if rows <= 0:
            break
        if units[i].rows <= rows:
            chosen.append(i)
            rows -= units[i].rows
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
    """Of an ordinary image among those of its client and size, in seconds; lower goes first.

    Shortest remaining work first gives the least mean latency, and ageing keeps it from starving
    the long ones.
    """
    return candidate.remaining - AGEING * candidate.age


def in_time(priority: Priority, age: float) -> bool:
    """Whether an ordinary image goes before batch ones that do not wait for long yet."""
    return priority is not Priority.BATCH or age >= BATCH_WAIT_S
