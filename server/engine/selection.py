"""Which images a tick has, and whose time of the device it was."""

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
    LONGEST_TICK_S,
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
"""Seconds of a tick beside images of other clients or sizes, which wait while it runs."""

FAIR_THROUGHPUT = 0.96
"""Share of the best throughput that such ticks reach, even if they take longer than that."""

LEAST_THROUGHPUT = 0.8
"""Share of the best that live ticks reach, even if they take longer than wished: where one row
alone takes that long, ticks of one row would only make all frames late."""

LIVE_PAUSE_S = 10.0
"""Seconds without a live frame after which none is expected."""


class Selection:
    """Chooses the images of each tick, by what their clients and streams have had of the device.

    The choice itself is pure (``fair_tick.py``, ``live_share.py``); here is what it goes by.

    Args:
        measurements: the engine's, which say how many rows a forward may have.
        live_tick_s: see ``Engine``.

    Attributes:
        turns: what clients and flows have had.
    """

    def __init__(self, measurements: EngineMeasurements, live_tick_s: float) -> None:
        self.turns = Turns()
        self._measurements = measurements
        self._live_tick_s = live_tick_s
        self._live_at = -inf
        self._shares = Shares()

    @property
    def expects_live(self) -> bool:
        """Whether there was a frame of a live stream lately; safe from any thread."""
        return monotonic() - self._live_at < LIVE_PAUSE_S

    @property
    def pace(self) -> float:
        """The share of the device that ordinary images have; safe from any thread."""
        return ORDINARY_SHARE if self.expects_live else 1.0

    @property
    def longest_aside_s(self) -> float:
        """Seconds that stages without a forward may take between two ticks."""
        return ORDINARY_SHARE * self._live_tick_s if self.expects_live else FAIR_TICK_S

    def note_live(self) -> None:
        """A live frame is under way, or has just been finished."""
        self._live_at = monotonic()

    def note_who_waits(self, under_way: Iterable[Sequence]) -> None:
        """Tell of the flows that have a turn; batch work has none while other images are to run.

        Else its client would seem to be served least for as long as it may not be served, and
        whatever goes by turns would wait for it.

        Args:
            under_way: all images, those that are not taken in yet among them.
        """
        ordinary = [one for one in under_way if not one.live]
        now = monotonic()
        running = [one for one in ordinary if not one.done]
        first = [one for one in running if in_time(one.priority, now - one.submitted_at)]
        done = [one for one in ordinary if one.done]
        self.turns.wait({one.flow for one in chain(done, first or running)}, now)

    def charge(self, parts: Mapping[Sequence, float], seconds: float) -> None:
        """Count seconds of the device as had by the clients of some images, by their parts."""
        whole = sum(parts.values())
        by_flow: dict[Flow, float] = {}
        for sequence, part in parts.items():
            if not sequence.live:
                by_flow[sequence.flow] = by_flow.get(sequence.flow, 0.0) + part
        for flow, part in by_flow.items():
            self.turns.charge(flow, seconds * part / whole)

    def charge_aside(
        self, parts: Mapping[Sequence, float], seconds: float, active: Listed[Sequence]
    ) -> None:
        """Count work beside the ticks as had by the clients of some images, and by live ones.

        Args:
            parts: of the work, by image.
            seconds: that it took.
            active: all images that are taken in.
        """
        live = sum(sequence.live for sequence in parts) / len(parts)
        self.share_out(active, seconds, live_s=live * seconds)
        self.charge(parts, seconds)

    def share_out(self, active: Listed[Sequence], seconds: float, *, live_s: float) -> None:
        """Count work beside the ticks towards the shares of live and ordinary images.

        Args:
            active: all images that are taken in.
            seconds: that it took.
            live_s: of these, for live images.
        """
        if self.expects_live and not all(sequence.live for sequence in active):
            self._shares = self._shares.after(live_s=live_s, ordinary_s=seconds - live_s)

    def next_tick(self, active: Listed[Sequence]) -> list[Sequence]:
        """The images whose rows the next forward has, those of the same adapters side by side."""
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
        # By their adapters and else oldest first, whoever's turn it is: what is kept, or recorded,
        # for the adapters of some rows in an order is of use whichever of their images came first.
        return sorted((running[i] for i in sorted(chosen)), key=_adapters_of)

    def recalling(self, active: Listed[Sequence]) -> list[Sequence]:
        """Images whose next stages are recalled at once, as many as a tick may have rows."""
        waiting = [one for one in active if one.recalls]
        waiting.sort(key=lambda one: (not one.live, self.turns.standing(one.flow)))
        most = min([self._measurements.row_budget, *(one.lane.row_cap.rows for one in waiting)])
        fitting = bisect_right([*accumulate(one.rows for one in waiting)], most)
        return waiting[: max(1, fitting)]

    def rows_of_tick(self, load: Load, lane: Lane) -> int:
        """How many rows the next tick of a lane has."""
        costs = self._costs_of(lane, live=load.live)
        if lane.fixed_rows is not None:
            return costs.most
        ticks = self._measurements.ticks
        return rows_of_tick(load, costs.most, costs.seconds, costs.longest_s, ticks)

    def _costs_of(self, lane: Lane, *, live: bool) -> LaneCosts:
        cost, fixed = lane.cost, lane.fixed_rows
        most = min(self._measurements.row_budget, lane.row_cap.rows)
        if live:
            longest_s = max(self._live_tick_s, cost.seconds_at(LEAST_THROUGHPUT, most))
        else:
            longest_s = self._longest_ordinary_s(cost, most)

        def seconds(rows: int) -> float:
            return cost.seconds(fixed or lane.size_of(rows))

        # A size that always shared its ticks would never show what it costs alone.
        mixes = None if cost.is_guess else lane.mixes
        return LaneCosts(most, seconds, longest_s, lane.area, mixes, cost.mixing)

    def _longest_ordinary_s(self, cost: TickCost, most: int) -> float:
        """Whoever comes during a tick waits for its end."""
        if self.expects_live:
            # A live frame waits for no longer than there was none.
            return min(self._live_tick_s, monotonic() - self._live_at)
        if self.turns.contended:
            fair_s = max(FAIR_TICK_S, cost.seconds_at(FAIR_THROUGHPUT, most))
            return min(LONGEST_TICK_S, fair_s)
        return LONGEST_TICK_S


def _adapters_of(sequence: Sequence) -> list[tuple[str, str, float]]:
    """Of the images of a request the same, so that those of a group stay side by side."""
    own = sequence.task.adapters
    return [(one.adapter.name, one.adapter.revision, one.weight) for one in own]
