"""Sharing of the device between live streams and ordinary images: pure, touches no device.

Live streams have the device except for a fixed share of its time, which is promised to ordinary
images; what ordinary images do not use is saved for them. Live streams share the rest equally among
themselves, by device time and not by frames: a stream with many stages or further predictions gets
fewer frames, and does not slow down the others beyond its share.
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
"""Share of device time promised to ordinary images while live ones would take all of it."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Service that streams and ordinary images have had from the device, in seconds.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996): a stream that was away is owed
    nothing, as it resumes at the clock.

    Attributes:
        credit: seconds that ordinary images may take from live ones now.
        clock: service of the least served of the streams with images under way.
        had: service of each stream that has had more than the clock.
    """

    credit: float = 0.0
    clock: float = 0.0
    had: Mapping[int, float] = field(default_factory=dict[int, float])

    def after(self, *, live_s: float, ordinary_s: float) -> Shares:
        """The shares after work outside of ticks, such as encoding and decoding.

        Args:
            live_s: seconds spent on live images while ordinary ones waited.
            ordinary_s: seconds spent on ordinary images.
        """
        earned = ORDINARY_SHARE * (live_s + ordinary_s)
        return replace(self, credit=self.credit + earned - ordinary_s)


class LiveChoice(NamedTuple):
    """The images of the next tick, as indices, and the shares after it."""

    chosen: list[int]
    shares: Shares


@dataclass(frozen=True, slots=True)
class Turn:
    """The turn of the streams of one lane: of images of one model and one latent shape.

    Attributes:
        first: oldest image of the least served stream; it runs in any case.
        here: images of streams in its lane by index, oldest first.
        wanted: number of their rows that a tick should have.
        room: maximum number of rows of a tick, ordinary ones included.
        costs: costs of the lane.
        until: service in seconds from which on a stream has no further images in the tick.
    """

    first: Candidate
    here: Sequence[tuple[int, Candidate]]
    wanted: int
    room: int
    costs: LaneCosts
    until: float

    def has_room_for(self, unit: Candidate, *, beside: int = 0) -> bool:
        """Whether an ordinary image fits into the tick beside ``beside`` rows of others."""
        fits = beside + unit.rows <= self.room - self.first.rows
        return fits and unit.lane == self.first.lane


class OrdinaryImages(NamedTuple):
    """Ordinary images in a tick of live ones, as indices, and their number of rows."""

    chosen: list[int]
    rows: int


def share_tick(
    candidates: Sequence[Candidate],
    shares: Shares,
    turns: Turns,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> LiveChoice:
    """Choose the next tick while images of live streams are under way.

    The least served stream decides the lane. The tick has images of all streams of the lane that
    are not ahead of it by the longest tick, oldest first, and as many ordinary images as their
    credit pays for. Ordinary images that cannot join, since their lane is another or they have too
    many rows, get a tick of their own as soon as their credit pays for it.

    Args:
        candidates: every image under way, oldest first, at least one of them of a stream.
        shares: shares after the last tick.
        turns: service of the clients of ordinary images, who share the ordinary part.
        lanes: costs of the lanes of all candidates.
        rows_of: function that returns the best number of rows for a load.
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
        # Rows that joined because they cost nothing leave no debt.
        credit = max(min(0.0, balance), balance - seconds * riders.rows / rows)
        chosen = [*due, *riders.chosen]
    had = {s: had for s, had in {**shares.had, **starts}.items() if had > clock}
    return LiveChoice([i for unit in chosen for i in members[unit]], Shares(credit, clock, had))


def _stream(unit: Candidate) -> int:
    if unit.stream is None:
        raise ValueError("an ordinary image belongs to no stream")
    return unit.stream


def _starts(units: Sequence[Candidate], shares: Shares) -> dict[int, float]:
    """Service of the streams with images under way; one that was away resumes at the clock."""
    streams = {unit.stream for unit in units if unit.stream is not None}
    return {stream: max(shares.clock, shares.had.get(stream, 0.0)) for stream in streams}


def _turn(
    units: Sequence[Candidate],
    starts: Mapping[int, float],
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> Turn:
    """The turn of the least served stream, and of those that share its lane."""
    clock = min(starts.values())
    live = [(i, unit) for i, unit in enumerate(units) if unit.stream is not None]
    first = next(unit for _, unit in live if starts[_stream(unit)] == clock)
    here = [(i, unit) for i, unit in live if unit.lane == first.lane]
    rows = [unit.rows for _, unit in here]
    load = Load(first.lane, sum(rows), max(rows), live=True)
    wanted = min(rows_of(load), load.rows)
    costs = lanes[first.lane]
    bound = bisect_right(range(1, costs.max_rows + 1), costs.max_tick_s, key=costs.seconds)
    return Turn(first, here, wanted, max(wanted, bound), costs, clock + costs.max_tick_s)


def _own_tick(
    units: Sequence[Candidate],
    ordinary: Sequence[int],
    turn: Turn,
    credit: float,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> tuple[list[int], float]:
    """Ordinary images that get a tick of their own now, and its seconds; none if it is not due.

    It is due if the first ordinary image in turn cannot join live ones and its credit pays for it.
    """
    if not ordinary or turn.has_room_for(units[ordinary[0]]):
        return [], 0.0
    head = units[ordinary[0]]
    costs = lanes[head.lane]
    if costs.seconds(head.rows) > credit:
        return [], 0.0
    here = [i for i in ordinary if units[i].lane == head.lane]
    wide = [units[i].rows for i in here]
    paid = bisect_right(range(1, costs.max_rows + 1), credit, key=costs.seconds)
    rows = min(paid, rows_of(Load(head.lane, sum(wide), max(wide), live=True)))
    chosen = fill(units, here, max(rows, head.rows))
    return chosen, costs.seconds(sum(units[i].rows for i in chosen))


def _riders(
    units: Sequence[Candidate], ordinary: Sequence[int], turn: Turn, credit: float
) -> OrdinaryImages:
    """Ordinary images that join, up to the first one that has too many rows or is not paid for.

    Those after it must not overtake it, or it would never be paid for. If the first in turn is of
    another lane, the others join only if that costs nothing.
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
    return OrdinaryImages(chosen, rows)


def _lengthening(rows: int, turn: Turn) -> float:
    """Seconds that ordinary rows cost the live ones; the share of the tick if they displace any."""
    seconds = turn.costs.seconds
    if turn.wanted + rows <= turn.room:
        return max(0.0, seconds(turn.wanted + rows) - seconds(turn.wanted))
    return seconds(turn.room) * rows / turn.room


def _due(turn: Turn, starts: Mapping[int, float], riding: int) -> list[int]:
    """Choose images of streams for the wanted rows, always one of the least served stream.

    Args:
        turn: turn that the images are chosen for.
        starts: service of the streams before the tick.
        riding: number of rows of ordinary images in the same tick.
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
            # Drop the whole stream, since later images would overtake this one.
            del queues[stream]
            continue
        chosen.append(i)
        rows -= unit.rows
        had[stream] += unit.rows * price
        if not queues[stream]:
            del queues[stream]
    return chosen
