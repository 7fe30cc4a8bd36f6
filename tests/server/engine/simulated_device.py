"""Simulates the engine's choice of ordinary ticks with known costs, in exact device time."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from server.engine.client import Client, Flow
from server.engine.fair_queue import Turns
from server.engine.fair_tick import fair_tick
from server.engine.scheduler import (
    MAX_TICK_S,
    Candidate,
    LaneCosts,
    Load,
    Priority,
    fill,
    rows_of_tick,
)
from server.engine.selection import FAIR_THROUGHPUT, FAIR_TICK_S

MAX_ROWS = 128

Curve = Callable[[int], float]
Choose = Callable[["Device", list[Candidate]], list[int]]


def cpu(rows: int) -> float:
    """Like the embedded model on one core: 22 ms for one row, 8.2 ms a row in large ticks."""
    return 0.0138 + 0.0081 * rows


def gpu(rows: int) -> float:
    """Small ticks all cost the same."""
    return max(0.023, 0.01 + 0.0033 * rows)


def large(rows: int) -> float:
    """Cost of large pictures, each of which fills the device."""
    return 0.7 * rows


@cache
def min_tick_s(curve: Curve, share: float) -> float:
    """Seconds of the shortest tick with that share of the best throughput."""
    best = min(curve(rows) / rows for rows in range(1, MAX_ROWS + 1))
    return next(curve(n) for n in range(1, MAX_ROWS + 1) if curve(n) <= n * best / share)


@dataclass
class Request:
    """Images of one size, each of which needs some stages of ``rows`` rows."""

    client: Client
    lane: int
    stages: int
    rows: int
    images: int
    came: float
    left: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = [self.stages] * self.images


@dataclass
class Sender:
    """Keeps ``at_once`` requests in progress, and pauses before it sends the next one."""

    client: Client
    at_once: int = 1
    stages: int = 4
    rows: int = 2
    images: int = 1
    lane: int = 0
    pause_s: float = 0.0


@dataclass
class Device:
    """A device that runs ticks, with a record of what it did.

    Attributes:
        curves: of each lane, seconds of a tick by its rows.
        areas: area of the latents of each lane, where lanes can share a forward.
        latencies: latencies of finished requests, by sender.
        seconds: seconds of the device, by client.
        rows: rows that were evaluated, by lane.
    """

    senders: Sequence[Sender]
    curves: dict[int, Curve]
    choose: Choose
    areas: dict[int, int] = field(default_factory=dict[int, int])
    now: float = 0.0
    turns: Turns = field(default_factory=Turns)
    latencies: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    seconds: defaultdict[Client, float] = field(default_factory=lambda: defaultdict(float))
    rows: Counter[int] = field(default_factory=Counter[int])
    lanes_run: list[int] = field(default_factory=list[int])

    def run(self, seconds: float) -> Device:
        """Simulate this many seconds."""
        under_way: list[tuple[int, Request]] = []
        next_at = [deque([self.now] * sender.at_once) for sender in self.senders]
        until = self.now + seconds
        while self.now < until:
            for number, sender in enumerate(self.senders):
                while next_at[number] and next_at[number][0] <= self.now:
                    came = next_at[number].popleft()
                    about = sender.client, sender.lane, sender.stages, sender.rows, sender.images
                    under_way.append((number, Request(*about, came)))
            if not under_way:
                self.now = min(times[0] for times in next_at if times)
                continue
            self._tick([request for _, request in under_way])
            for number, request in under_way:
                if not any(request.left):
                    self.latencies.setdefault(number, []).append(self.now - request.came)
                    next_at[number].append(self.now + self.senders[number].pause_s)
            under_way = [one for one in under_way if any(one[1].left)]
        return self

    def cost(self, lane: int) -> LaneCosts:
        """The costs of a lane, as the engine computes them."""
        curve = self.curves[lane]
        fair_s = min(MAX_TICK_S, max(FAIR_TICK_S, min_tick_s(curve, FAIR_THROUGHPUT)))
        max_tick_s = fair_s if self.turns.contended else MAX_TICK_S
        mixes = True if self.areas else None
        return LaneCosts(MAX_ROWS, curve, max_tick_s, self.areas.get(lane, 0), mixes)

    def rows_of(self, load: Load) -> int:
        """The number of rows, as the engine chooses it."""
        costs = self.cost(load.lane)
        return rows_of_tick(load, MAX_ROWS, costs.seconds, costs.max_tick_s, tick=1)

    def _tick(self, requests: list[Request]) -> None:
        images = [(one, k) for one in requests for k, left in enumerate(one.left) if left]
        candidates = [
            Candidate(
                rows=one.rows,
                remaining=one.left[k] * one.rows * self.cost(one.lane).seconds_a_row,
                age=self.now - one.came,
                priority=Priority.INTERACTIVE,
                lane=one.lane,
                flow=Flow(one.client, one.lane),
            )
            for one, k in images
        ]
        self.turns.wait({candidate.flow for candidate in candidates}, self.now)
        chosen = self.choose(self, candidates)
        lanes = {candidates[i].lane for i in chosen}
        assert len(lanes) == 1 or lanes <= self.areas.keys()
        largest = max(lanes, key=lambda lane: self.areas.get(lane, 0))
        rows = sum(candidates[i].rows for i in chosen)
        seconds = self.curves[largest](rows)
        self.now += seconds
        self.lanes_run.append(largest)
        parts = [candidates[i].rows * self.areas.get(candidates[i].lane, 1) for i in chosen]
        for i, part in zip(chosen, parts, strict=True):
            request, k = images[i]
            request.left[k] -= 1
            self.rows[request.lane] += request.rows
            part_s = seconds * part / sum(parts)
            self.seconds[request.client] += part_s
            self.turns.charge(candidates[i].flow, part_s)


def fairly(device: Device, candidates: list[Candidate]) -> list[int]:
    """The candidates of the next tick, as the engine chooses them."""
    lanes = {lane: device.cost(lane) for lane in device.curves}
    return fair_tick(candidates, device.turns, lanes, device.rows_of)


def first_come(device: Device, candidates: list[Candidate]) -> list[int]:
    """First come, first served, in ticks as large as pays; fairness is measured against this."""
    lane = candidates[0].lane
    here = [i for i, one in enumerate(candidates) if one.lane == lane]
    wide = [candidates[i].rows for i in here]
    load = Load(lane, sum(wide), max(wide), live=False)
    rows = rows_of_tick(load, MAX_ROWS, device.curves[lane], MAX_TICK_S, tick=1)
    return fill(candidates, here, rows)


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all have the same, 1 / n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))
