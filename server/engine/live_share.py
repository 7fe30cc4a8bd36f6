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

from server.engine.fair_tick import in_turn
from server.engine.scheduler import Load, fill, units_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from server.engine.fair_queue import Turns
    from server.engine.scheduler import Candidate, LaneCosts

ORDINARY_SHARE = 0.25
"""Of the device's time, what ordinary images are promised while live ones would take all of it."""


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


class LiveChoice(NamedTuple):
    """The images of the next tick, as indices, and the shares once it has run."""

    chosen: list[int]
    shares: Shares


@dataclass(frozen=True, slots=True)
class Turn:
    """The streams of one lane, whose turn it is.

    Attributes:
        first: the oldest image of the stream that has had least; it runs in any case.
        here: images of streams in its lane by index, oldest first.
        wanted: rows of them that a tick should have.
        room: rows that a tick may have, ordinary ones among them.
        costs: of the lane.
        until: what a stream may have had, in seconds, to have its images in the tick.
    """

    first: Candidate
    here: Sequence[tuple[int, Candidate]]
    wanted: int
    room: int
    costs: LaneCosts
    until: float

    def has_room_for(self, unit: Candidate, *, beside: int = 0) -> bool:
        """Whether an ordinary image can come along beside so many rows of others."""
        fits = beside + unit.rows <= self.room - self.first.rows
        return fits and unit.lane == self.first.lane


class Riders(NamedTuple):
    """Ordinary images in a tick of live ones, as indices, and their rows."""

    chosen: list[int]
    rows: int


def share_tick(
    candidates: Sequence[Candidate],
    shares: Shares,
    turns: Turns,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> LiveChoice:
    """The next tick while images of live streams are under way.

    The stream that has had least decides the lane. Its tick has the images of all streams of the
    lane that are not ahead of it by the longest tick, oldest first, and as many ordinary ones as
    their credit pays for. Ordinary images that cannot come along, as they are of another lane or
    too wide, have a tick of their own as soon as their credit pays for it.

    Args:
        candidates: every image under way, oldest first, at least one of them of a stream.
        shares: as the last tick left them.
        turns: what the clients of ordinary images have had, who share their part.
        lanes: of all candidates.
        rows_of: the best number of rows for a load.
    """
    units, members = units_of(candidates)
    waiting = [i for i, unit in enumerate(units) if unit.stream is None]
    ordinary = list(in_turn(units, waiting, turns, lanes))
    starts = _starts(units, shares)
    clock = min(starts.values())
    turn = _turn(units, starts, lanes, rows_of)
    chosen, seconds = _own_tick(units, ordinary, turn, shares.credit, lanes, rows_of)
    if chosen:
        credit = shares.credit - (1 - ORDINARY_SHARE) * seconds
    else:
        riders = _riders(units, ordinary, turn, shares.credit)
        due = _due(turn, starts, riders.rows)
        rows = sum(units[i].rows for i in due) + riders.rows
        seconds = turn.costs.seconds(rows)
        for i in due:
            starts[_stream(units[i])] += seconds * units[i].rows / rows
        balance = shares.credit + (ORDINARY_SHARE * seconds if ordinary else 0.0)
        # What came along for nothing leaves no debt.
        credit = max(min(0.0, balance), balance - seconds * riders.rows / rows)
        chosen = [*due, *riders.chosen]
    had = {s: had for s, had in {**shares.had, **starts}.items() if had > clock}
    return LiveChoice([i for unit in chosen for i in members[unit]], Shares(credit, clock, had))


def _stream(unit: Candidate) -> int:
    if unit.stream is None:
        raise ValueError("an ordinary image is of no stream")
    return unit.stream


def _starts(units: Sequence[Candidate], shares: Shares) -> dict[int, float]:
    """What the streams with images under way have had; those that were away begin anew."""
    streams = {unit.stream for unit in units if unit.stream is not None}
    return {stream: max(shares.clock, shares.had.get(stream, 0.0)) for stream in streams}


def _turn(
    units: Sequence[Candidate],
    starts: Mapping[int, float],
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> Turn:
    """The turn of the stream that has had least, and of those that share its lane."""
    clock = min(starts.values())
    live = [(i, unit) for i, unit in enumerate(units) if unit.stream is not None]
    first = next(unit for _, unit in live if starts[_stream(unit)] == clock)
    here = [(i, unit) for i, unit in live if unit.lane == first.lane]
    rows = [unit.rows for _, unit in here]
    load = Load(first.lane, sum(rows), max(rows), live=True)
    wanted = min(rows_of(load), load.rows)
    costs = lanes[first.lane]
    bound = bisect_right(range(1, costs.most + 1), costs.longest_s, key=costs.seconds)
    return Turn(first, here, wanted, max(wanted, bound), costs, clock + costs.longest_s)


def _own_tick(
    units: Sequence[Candidate],
    ordinary: Sequence[int],
    turn: Turn,
    credit: float,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> tuple[list[int], float]:
    """Ordinary images that have a tick of their own now, and its seconds; else none.

    It is due where the first in turn cannot come along with live ones and is paid for.
    """
    if not ordinary or turn.has_room_for(units[ordinary[0]]):
        return [], 0.0
    head = units[ordinary[0]]
    costs = lanes[head.lane]
    if costs.seconds(head.rows) > credit:
        return [], 0.0
    here = [i for i in ordinary if units[i].lane == head.lane]
    wide = [units[i].rows for i in here]
    paid = bisect_right(range(1, costs.most + 1), credit, key=costs.seconds)
    rows = min(paid, rows_of(Load(head.lane, sum(wide), max(wide), live=True)))
    chosen = fill(units, here, max(rows, head.rows))
    return chosen, costs.seconds(sum(units[i].rows for i in chosen))


def _riders(
    units: Sequence[Candidate], ordinary: Sequence[int], turn: Turn, credit: float
) -> Riders:
    """Ordinary images that come along, until one is too wide or not paid for.

    The next ones must not go before it, or it would never be paid for. Where the first in turn
    is of another lane the others come along if that costs nothing.
    """
    chosen: list[int] = []
    rows = 0
    if ordinary and units[ordinary[0]].lane != turn.first.lane:
        credit = 0.0
    for i in ordinary:
        unit = units[i]
        if unit.lane != turn.first.lane:
            continue
        longer_s = _lengthening(rows + unit.rows, turn)
        if longer_s > max(0.0, credit) or not turn.has_room_for(unit, beside=rows):
            break
        chosen.append(i)
        rows += unit.rows
    return Riders(chosen, rows)


def _lengthening(rows: int, turn: Turn) -> float:
    """Seconds that so many ordinary rows cost the live ones; their part where they displace any."""
    seconds = turn.costs.seconds
    if turn.wanted + rows <= turn.room:
        return max(0.0, seconds(turn.wanted + rows) - seconds(turn.wanted))
    return seconds(turn.room) * rows / turn.room


def _due(turn: Turn, starts: Mapping[int, float], riding: int) -> list[int]:
    """Images of streams, always of the one that has had least, for as many rows as are wanted.

    Args:
        turn: whose images.
        starts: what their streams have had.
        riding: rows of ordinary images in the same tick.
    """
    rows = min(turn.wanted, turn.room - riding)
    price = turn.costs.seconds(rows + riding) / (rows + riding)
    queues: dict[int, deque[tuple[int, Candidate]]] = {}
    for i, unit in turn.here:
        queues.setdefault(_stream(unit), deque()).append((i, unit))
    had = {stream: starts[stream] for stream in queues}
    chosen: list[int] = []
    while queues:
        stream = min(queues, key=had.__getitem__)
        i, unit = queues[stream].popleft()
        if chosen and (unit.rows > rows or had[stream] >= turn.until):
            # Nor its later images, which would overtake this one.
            del queues[stream]
            continue
        chosen.append(i)
        rows -= unit.rows
        had[stream] += unit.rows * price
        if not queues[stream]:
            del queues[stream]
    return chosen
