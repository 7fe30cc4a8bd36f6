"""How live streams and ordinary images share the device: pure, touches no device.

Live streams have the device but for a fixed share of its time, which ordinary images are promised
and of which they save what they do not use. Among themselves live streams share it equally by
device time, not by frames: a stream of many stages or with further predictions gets fewer frames,
and does not slow down the others beyond its share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from server.engine.scheduler import Load, select, units_of, urgency

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from server.engine.scheduler import Candidate

ORDINARY_SHARE = 0.25
"""Of the device's time, what ordinary images are promised while live ones would take all of it."""


@dataclass(frozen=True, slots=True)
class LaneCosts:
    """What a lane's ticks cost and may cost.

    Attributes:
        most: rows that a tick may have.
        seconds: expected for a tick of so many rows.
        longest_s: that a tick may take, where fewer rows can help it.
    """

    most: int
    seconds: Callable[[int], float]
    longest_s: float


@dataclass(frozen=True, slots=True)
class Shares:
    """What streams and ordinary images have had of the device, in seconds.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996): a stream that was away is owed
    nothing, as it resumes at the clock.

    Attributes:
        credit: that ordinary images may take from live ones now.
        clock: what the least served of the streams with images under way has had.
        had: what each stream has had, where that is more than the clock.
    """

    credit: float = 0.0
    clock: float = 0.0
    had: Mapping[int, float] = field(default_factory=dict[int, float])

    def after(self, *, live_s: float, ordinary_s: float) -> Shares:
        """The same after work beside the ticks, such as encoding and decoding.

        Args:
            live_s: seconds of it for live images, while ordinary ones waited.
            ordinary_s: seconds of it for ordinary images.
        """
        earned = ORDINARY_SHARE * (live_s + ordinary_s)
        return replace(self, credit=self.credit + earned - ordinary_s)


class Choice(NamedTuple):
    """The images of the next tick, as indices, and the shares once it has run."""

    chosen: list[int]
    shares: Shares


class Riders(NamedTuple):
    """Ordinary images in a tick of live ones, as indices, and their rows."""

    chosen: list[int]
    rows: int


def share_tick(
    candidates: Sequence[Candidate],
    shares: Shares,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> Choice:
    """The next tick while images of live streams are under way.

    The stream that has had least decides the lane. Its tick has the images of all streams of the
    lane that are not ahead of it by the longest tick, oldest first, and as many ordinary ones as
    their credit pays for. Ordinary images that cannot come along, as they are of another lane or
    too wide, have a tick of their own as soon as their credit pays for it.

    Args:
        candidates: every image under way, oldest first, at least one of them of a stream.
        shares: as the last tick left them.
        lanes: of all candidates.
        rows_of: the best number of rows for a load.
    """
    units, members = units_of(candidates)
    live = [i for i, unit in enumerate(units) if unit.stream is not None]
    waiting = [i for i, unit in enumerate(units) if unit.stream is None]
    ordinary = sorted(waiting, key=lambda i: urgency(units[i]))
    starts = _starts([units[i] for i in live], shares)
    clock = min(starts.values())
    first = next(i for i in live if starts[_stream(units[i])] == clock)
    lane = units[first].lane
    here = [i for i in live if units[i].lane == lane]
    load = Load(lane, sum(units[i].rows for i in here), max(units[i].rows for i in here), live=True)
    wanted = min(rows_of(load), load.rows)
    costs = lanes[lane]
    room = max(wanted, bisect_right(range(1, costs.most + 1), costs.longest_s, key=costs.seconds))

    if ordinary and not _comes_along(units[ordinary[0]], lane, room - units[first].rows):
        own = _own_tick(units, ordinary, shares.credit, lanes, rows_of)
        if own is not None:
            chosen, seconds = own
            credit = shares.credit - (1 - ORDINARY_SHARE) * seconds
            after = Shares(credit, clock, _ahead(starts, shares, clock))
            return Choice([i for unit in chosen for i in members[unit]], after)
    riders = _riders(units, ordinary, units[first], wanted, room, costs, shares.credit)
    left = min(wanted, room - riders.rows)
    price = costs.seconds(left + riders.rows) / (left + riders.rows)
    due = _due([(i, units[i]) for i in here], starts, left, price, clock + costs.longest_s)
    rows = sum(units[i].rows for i in due) + riders.rows
    seconds = costs.seconds(rows)
    for i in due:
        starts[_stream(units[i])] += seconds * units[i].rows / rows
    balance = shares.credit + (ORDINARY_SHARE * seconds if ordinary else 0.0)
    # What came along for nothing leaves no debt.
    credit = max(min(0.0, balance), balance - seconds * riders.rows / rows)
    after = Shares(credit, clock, _ahead(starts, shares, clock))
    return Choice([i for unit in (*due, *riders.chosen) for i in members[unit]], after)


def _stream(unit: Candidate) -> int:
    if unit.stream is None:
        raise ValueError("an ordinary image is of no stream")
    return unit.stream


def _starts(live: Sequence[Candidate], shares: Shares) -> dict[int, float]:
    """What the streams with images under way have had; those that were away begin anew."""
    streams = {_stream(unit) for unit in live}
    return {stream: max(shares.clock, shares.had.get(stream, 0.0)) for stream in streams}


def _ahead(starts: Mapping[int, float], shares: Shares, clock: float) -> dict[int, float]:
    return {s: had for s, had in {**shares.had, **starts}.items() if had > clock}


def _comes_along(unit: Candidate, lane: int, room: int) -> bool:
    return unit.lane == lane and unit.rows <= room


def _own_tick(
    units: Sequence[Candidate],
    ordinary: Sequence[int],
    credit: float,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> tuple[list[int], float] | None:
    """Ordinary images of the most urgent one's lane, and the seconds of their tick."""
    head = units[ordinary[0]]
    costs = lanes[head.lane]
    if costs.seconds(head.rows) > credit:
        return None
    here = [i for i in ordinary if units[i].lane == head.lane]
    wide = [units[i].rows for i in here]
    paid = bisect_right(range(1, costs.most + 1), credit, key=costs.seconds)
    rows = min(paid, rows_of(Load(head.lane, sum(wide), max(wide), live=True)))
    chosen = [here[i] for i in select([units[i] for i in here], rows)]
    return chosen, costs.seconds(sum(units[i].rows for i in chosen))


def _riders(
    units: Sequence[Candidate],
    ordinary: Sequence[int],
    first: Candidate,
    wanted: int,
    room: int,
    costs: LaneCosts,
    credit: float,
) -> Riders:
    """Ordinary images that come along, until one is too wide or not paid for.

    The next ones must not go before it, or it would never be paid for. Where the most urgent one
    is of another lane the others come along if that costs nothing.
    """
    chosen: list[int] = []
    rows = 0
    if ordinary and units[ordinary[0]].lane != first.lane:
        credit = 0.0
    for i in ordinary:
        unit = units[i]
        if unit.lane != first.lane:
            continue
        longer_s = _lengthening(rows + unit.rows, wanted, room, costs)
        if longer_s > max(0.0, credit) or rows + unit.rows > room - first.rows:
            break
        chosen.append(i)
        rows += unit.rows
    return Riders(chosen, rows)


def _lengthening(rows: int, wanted: int, room: int, costs: LaneCosts) -> float:
    """Seconds that so many ordinary rows cost the live ones; their part where they displace any."""
    if wanted + rows <= room:
        return max(0.0, costs.seconds(wanted + rows) - costs.seconds(wanted))
    return costs.seconds(room) * rows / room


def _due(
    live: Sequence[tuple[int, Candidate]],
    starts: Mapping[int, float],
    rows: int,
    price: float,
    until: float,
) -> list[int]:
    """Images of streams, always of the one that has had least, until there are so many rows.

    Args:
        live: images by index, oldest first.
        starts: what their streams have had.
        rows: of all of them; more only where the first needs more.
        price: seconds of a row.
        until: seconds from which on a stream is too far ahead of the least served one.
    """
    queues: dict[int, deque[tuple[int, Candidate]]] = {}
    for i, unit in live:
        queues.setdefault(_stream(unit), deque()).append((i, unit))
    had = {stream: starts[stream] for stream in queues}
    chosen: list[int] = []
    while queues:
        stream = min(queues, key=had.__getitem__)
        i, unit = queues[stream].popleft()
        if chosen and (unit.rows > rows or had[stream] >= until):
            # Nor its later images, which would overtake this one.
            del queues[stream]
            continue
        chosen.append(i)
        rows -= unit.rows
        had[stream] += unit.rows * price
        if not queues[stream]:
            del queues[stream]
    return chosen
