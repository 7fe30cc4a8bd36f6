"""Scheduling of a tick: candidates, their urgency, and the number of rows: pure, no device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from server.engine.client import ANY_FLOW, Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence


class Priority(IntEnum):
    """Priority class of an image; lower goes first."""

    LIVE = 0
    INTERACTIVE = 1
    BATCH = 2


BATCH_WAIT_S = 600.0
"""Seconds after which a batch image counts as interactive, so that it does not starve. Waiting
never makes an image count as live (``live_share.py``)."""

AGEING = 0.25
"""Seconds of lead that a second of age is worth. An image that needs the device for 3 s in all goes
before all later ones of its client and size once it is 12 s old, however short they are."""

NEAR_BEST = 0.995
"""Share of the best throughput that is good enough, since fewer rows mean less latency."""

MAX_TICK_S = 2.0
"""Maximum intended seconds of a tick, since nobody joins or leaves during one."""

PROBED_EVERY = 16
"""Number of ticks between trials of another size, which keep its estimated cost accurate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image under way, as selection sees it.

    Attributes:
        rows: number of rows that its next stage needs in the forward pass.
        remaining: seconds of the device that it still needs in all.
        age: seconds since it arrived.
        priority: priority class.
        lane: identity of its lane; images of one lane can share a forward pass.
        group: identity of its group, whose images run in the same ticks or not at all; None if it
            has none.
        stream: live stream that it is a frame of; None for an ordinary image.
        flow: its client, and a key of the client's images that cost the same.
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
    """Work that waits in the lane whose turn it is.

    Attributes:
        lane: identity of the lane.
        rows: number of rows that all of its images need in their next stages.
        widest: maximum number of rows of one image or group.
        live: whether images of live streams are under way, in this lane or another.
    """

    lane: int
    rows: int
    widest: int
    live: bool


@dataclass(frozen=True, slots=True)
class LaneCosts:
    """Costs of a lane's ticks, and limits on them.

    Attributes:
        max_rows: maximum number of rows in a tick.
        seconds: function from a number of rows to the expected seconds of a tick.
        max_tick_s: maximum seconds of a tick, where fewer rows can shorten it.
        area: number of cells of a latent; in a forward pass of several sizes each row costs as much
            as one of the largest.
        mixes: equal for lanes of different sizes that can share a forward pass; None if it cannot.
        mixing: factor by which a pass takes longer if it has smaller sizes as well.
    """

    max_rows: int
    seconds: Callable[[int], float]
    max_tick_s: float
    area: int = 0
    mixes: Hashable = None
    mixing: float = 1.0

    def mixes_with(self, other: LaneCosts) -> bool:
        """Whether images of both lanes can share a forward pass."""
        return self.mixes is not None and self.mixes == other.mixes

    @property
    def seconds_a_row(self) -> float:
        """Seconds per row in the largest tick."""
        return self.seconds(self.max_rows) / self.max_rows


def rows_of_tick(
    load: Load, max_rows: int, seconds: Callable[[int], float], max_tick_s: float, tick: int
) -> int:
    """Choose the number of rows of the next tick.

    The number should bring all waiting images through their next stage soonest. Of sizes that do
    this about equally well it is the smallest, since fewer rows mean a shorter tick. What fits into
    one tick may run in one or in several equal ones. If more waits than that, images whose stage
    has run want the next one before the last have run theirs. Then no tick is short of rows, and
    the seconds per row decide.

    Args:
        load: work that waits.
        max_rows: maximum number of rows in a tick.
        seconds: function from a number of rows to the expected seconds of a tick.
        max_tick_s: maximum seconds of a tick, where fewer rows can shorten it.
        tick: number of the tick; at every 16th another size is tried if the queue is long.
    """
    fits = load.rows <= max_rows
    sizes = _equal_ticks(load.rows, load.widest) if fits else _full_ticks(load, max_rows)
    options = [(rows, ticks, seconds(rows)) for rows, ticks in sizes]
    short = [option for option in options if option[2] <= max_tick_s] or options[-1:]
    soonest = min(ticks * each for _, ticks, each in short)
    rows = min(rows for rows, ticks, each in short if ticks * each <= soonest / NEAR_BEST)
    if tick % PROBED_EVERY == 0 and load.rows > 2 * rows:
        tried = rows * 2 if tick // PROBED_EVERY % 2 else rows // 2
        if load.widest <= tried <= max_rows and seconds(tried) <= max_tick_s:
            return tried
    return rows


def _equal_ticks(waiting: int, widest: int) -> Iterator[tuple[int, float]]:
    """Rows per tick, and number of equal ticks for all that waits, from most rows to fewest."""
    rows = waiting
    while rows > 0:
        ticks = -(-waiting // rows)
        even = -(-waiting // ticks)
        # Whole images only: a size that ends inside an image would leave it out.
        yield min(-(-even // widest) * widest, max(rows, widest)), ticks
        rows = _smaller(even)


def _full_ticks(load: Load, max_rows: int) -> Iterator[tuple[int, float]]:
    """The same if more waits than one tick can have: shares of ticks that are always full."""
    rows = max_rows
    while rows > 0:
        whole = max(rows // load.widest, 1) * load.widest
        yield whole, load.rows / whole
        rows = _smaller(min(rows, whole))


def _smaller(rows: int) -> int:
    """The next size to try; closer ones would differ by less than the error of the estimates."""
    return min(rows - 1, rows * 7 // 8)


def fill(units: Sequence[Candidate], order: Iterable[int], rows: int) -> list[int]:
    """Choose as many images as fit; a smaller one may take the place of one that does not fit.

    Args:
        units: images and groups.
        order: indices of some of them, in the order of their turns.
        rows: number of rows that there is room for.

    Returns:
        Indices of those that fit, in the same order.
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
    """Candidates with each group merged into one, and the indices that each stands for."""
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
    """Rank of an ordinary image among those of its client and size, in seconds; lower goes first.

    Shortest remaining work first gives the least mean latency, and ageing keeps long images from
    starving.
    """
    return candidate.remaining - AGEING * candidate.age


def in_time(priority: Priority, age: float) -> bool:
    """Whether an ordinary image precedes batch images that have not waited for long."""
    return priority is not Priority.BATCH or age >= BATCH_WAIT_S
