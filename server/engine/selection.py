"""Selection of the images of each tick, and accounting of the device time they use."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, chain
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from server.engine.fair_queue import Turns
from server.engine.fair_tick import fair_tick
from server.engine.live_share import ORDINARY_SHARE, Shares, share_tick
from server.engine.scheduler import (
    MAX_TICK_S,
    Candidate,
    LaneCosts,
    Load,
    in_time,
    rows_of_tick,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Sequence as Listed

    from server.engine.client import Flow
    from server.engine.cost_model import TickCost
    from server.engine.metrics import EngineMeasurements
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import Sequence

__all__ = ["FAIR_THROUGHPUT", "FAIR_TICK_S", "Selection"]

FAIR_TICK_S = 0.1
"""Maximum seconds of a tick while images of other clients or sizes wait for its end."""

FAIR_THROUGHPUT = 0.96
"""Share of the best throughput that such ticks reach even if they take longer for it."""

MIN_THROUGHPUT = 0.8
"""Share of the best throughput that live ticks reach even if they take longer than intended. If one
row alone takes that long, ticks of one row would only make all frames late."""

LIVE_PAUSE_S = 10.0
"""Seconds after the last live frame until no further one is expected."""


class Selection:
    """Chooses the images of each tick by the service that clients and streams have had.

    The choice itself is pure (``fair_tick.py``, ``live_share.py``); this class collects its inputs.

    Args:
        measurements: counters of the engine, which hold the row budget.
        live_tick_s: see ``Engine``.

    Attributes:
        turns: service that clients and flows have had.
    """

    def __init__(self, measurements: EngineMeasurements, live_tick_s: float) -> None:
        self.turns = Turns()
        self._measurements = measurements
        self._live_tick_s = live_tick_s
        self._live_at = -inf
        self._shares = Shares()

    @property
    def expects_live(self) -> bool:
        """Whether there was a frame of a live stream recently; safe from any thread."""
        return monotonic() - self._live_at < LIVE_PAUSE_S

    @property
    def pace(self) -> float:
        """Share of the device that ordinary images have; safe from any thread."""
        return ORDINARY_SHARE if self.expects_live else 1.0

    @property
    def max_side_work_s(self) -> float:
        """Maximum seconds that stages without a forward pass may take between two ticks."""
        return ORDINARY_SHARE * self._live_tick_s if self.expects_live else FAIR_TICK_S

    def note_live(self) -> None:
        """Note that a live frame is under way, or has just been finished."""
        self._live_at = monotonic()

    def note_who_waits(self, under_way: Iterable[Sequence]) -> None:
        """Set the flows that have a turn; batch work has none while other images can run.

        Otherwise a client of batch work would seem the least served for as long as it may not be
        served, and everything that goes by turns would wait for it.

        Args:
            under_way: all images, including those that are not admitted yet.
        """
        ordinary = [one for one in under_way if not one.live]
        now = monotonic()
        running = [one for one in ordinary if not one.done]
        first = [one for one in running if in_time(one.priority, now - one.submitted_at)]
        done = [one for one in ordinary if one.done]
        self.turns.wait({one.flow for one in chain(done, first or running)}, now)

    def charge(self, parts: Mapping[Sequence, float], seconds: float) -> None:
        """Charge seconds of the device to the clients of some images, in proportion to parts."""
        whole = sum(parts.values())
        by_flow: dict[Flow, float] = {}
        for sequence, part in parts.items():
            if not sequence.live:
                by_flow[sequence.flow] = by_flow.get(sequence.flow, 0.0) + part
        for flow, part in by_flow.items():
            self.turns.charge(flow, seconds * part / whole)

    def charge_side_work(
        self, parts: Mapping[Sequence, float], seconds: float, active: Listed[Sequence]
    ) -> None:
        """Charge work outside of ticks to the clients of some images, and to live ones.

        Args:
            parts: part of each image in the work.
            seconds: seconds that it took.
            active: all images that are admitted.
        """
        live = sum(sequence.live for sequence in parts) / len(parts)
        self.share_out(active, seconds, live_s=live * seconds)
        self.charge(parts, seconds)

    def share_out(self, active: Listed[Sequence], seconds: float, *, live_s: float) -> None:
        """Count work outside of ticks towards the shares of live and ordinary images.

        Args:
            active: all images that are admitted.
            seconds: seconds that it took.
            live_s: part of these seconds spent on live images.
        """
        if self.expects_live and not all(sequence.live for sequence in active):
            self._shares = self._shares.after(live_s=live_s, ordinary_s=seconds - live_s)

    def next_tick(self, active: Listed[Sequence]) -> list[Sequence]:
        """Choose the images of the next tick, with those of the same adapters side by side."""
        running = [one for one in active if not (one.done or one.recalls)]
        lanes = {id(sequence.lane): sequence.lane for sequence in running}
        live = any(sequence.live for sequence in running)
        costs = {key: self._costs_of(lane, live=live) for key, lane in lanes.items()}
        prices = {key: cost.seconds_a_row for key, cost in costs.items()}
        now = monotonic()
        candidates = [
            Candidate(
                rows=s.rows,
                remaining=s.remaining * prices[id(s.lane)],
                age=now - s.submitted_at,
                priority=s.priority,
                lane=id(s.lane),
                group=None if s.task.group is None else id(s.task.group),
                stream=s.stream,
                flow=s.flow,
            )
            for s in running
        ]

        def rows_of(load: Load) -> int:
            return self.rows_of_tick(load, lanes[load.lane])

        if live:
            self.note_live()
            choice = share_tick(candidates, self._shares, self.turns, costs, rows_of)
            self._shares = choice.shares
            chosen = choice.chosen
        else:
            chosen = fair_tick(candidates, self.turns, costs, rows_of)
        # By adapters and otherwise oldest first, whoever's turn it is: what is cached or recorded
        # for a combination of adapters can then be used whichever image came first.
        return sorted((running[i] for i in sorted(chosen)), key=_adapters_of)

    def recalling(self, active: Listed[Sequence]) -> list[Sequence]:
        """Images that recall their next stage, as many as a tick may have rows."""
        waiting = [one for one in active if one.recalls]
        waiting.sort(key=lambda one: (not one.live, self.turns.virtual_times_of(one.flow)))
        max_rows = min([self._measurements.row_budget, *(one.lane.row_cap.rows for one in waiting)])
        fitting = bisect_right([*accumulate(one.rows for one in waiting)], max_rows)
        return waiting[: max(1, fitting)]

    def rows_of_tick(self, load: Load, lane: Lane) -> int:
        """Number of rows of the next tick of a lane."""
        costs = self._costs_of(lane, live=load.live)
        if lane.fixed_rows is not None:
            return costs.max_rows
        ticks = self._measurements.ticks
        return rows_of_tick(load, costs.max_rows, costs.seconds, costs.max_tick_s, ticks)

    def _costs_of(self, lane: Lane, *, live: bool) -> LaneCosts:
        cost, fixed = lane.cost, lane.fixed_rows
        max_rows = min(self._measurements.row_budget, lane.row_cap.rows)
        if live:
            max_tick_s = max(self._live_tick_s, cost.seconds_at(MIN_THROUGHPUT, max_rows))
        else:
            max_tick_s = self._max_ordinary_tick_s(cost, max_rows)

        def seconds(rows: int) -> float:
            return cost.seconds(fixed or lane.size_of(rows))

        # A size that always shared its ticks would never reveal its own cost.
        mixes = None if cost.is_guess else lane.mixes
        return LaneCosts(max_rows, seconds, max_tick_s, lane.area, mixes, cost.mixing)

    def _max_ordinary_tick_s(self, cost: TickCost, max_rows: int) -> float:
        """Maximum seconds of a tick of ordinary images, since newcomers wait for its end."""
        if self.expects_live:
            # A live frame waits no longer than the pause before it has lasted.
            return min(self._live_tick_s, monotonic() - self._live_at)
        if self.turns.contended:
            fair_s = max(FAIR_TICK_S, cost.seconds_at(FAIR_THROUGHPUT, max_rows))
            return min(MAX_TICK_S, fair_s)
        return MAX_TICK_S


def _adapters_of(sequence: Sequence) -> list[tuple[str, str, float]]:
    """Sort key, equal for all images of a request, so that those of a group stay side by side."""
    own = sequence.task.adapters
    return [(one.adapter.name, one.adapter.revision, one.weight) for one in own]
