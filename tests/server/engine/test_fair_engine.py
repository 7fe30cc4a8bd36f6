"""Clients and sizes take turns in the real engine, counted in forwards and calls of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from server.engine.client import Client
from server.engine.fair_queue import Turns
from server.engine.scheduler import Candidate, LaneCosts, Load, Priority, fill
from tests.server.engine.test_fairness import A, B

LARGE, SMALL = 128, 64


class Log:
    """The real model, which records what it does, and for how many cells of latents."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def evaluate(self, x: Any, *more: Any) -> Any:
        self.calls.append(("tick", x.shape[-1]))
        return self._model.evaluate(x, *more)

    def decode(self, latents: Any) -> Any:
        self.calls.append(("decode", latents.shape[-1]))
        return self._model.decode(latents)


def oldest_first(
    candidates: Sequence[Candidate],
    _: Turns,
    lanes: dict[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> list[int]:
    """First come, first served."""
    if not candidates:
        return []
    here = [i for i, one in enumerate(candidates) if one.lane == candidates[0].lane]
    return fill(candidates, here, lanes[candidates[0].lane].max_rows)


FIRST_COME = {
    "server.engine.selection.fair_tick": oldest_first,
    "server.engine.fair_queue.Turns.flow_due": lambda *_: True,
    "server.engine.fair_queue.Turns.virtual_times_of": lambda *_: (0.0, 0.0),
}


@pytest.fixture(params=["fair", "first come"])
def fair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether turns are fair, as in the engine, or oldest first, as a control."""
    for target, instead in FIRST_COME.items() if request.param != "fair" else ():
        monkeypatch.setattr(target, instead)
    return request.param == "fair"


def beside(
    engine: Any, listen: Any, first: Iterable[Any], then: Iterable[Any], clients: Sequence[Client]
) -> int:
    """Submit some images during the first forward of others; the engine's ticks when they end."""
    flood, one = [*first], [*then]
    running, hearing = listen(len(flood)), listen(len(one))
    ticks: list[int] = []
    hearing.on_end = lambda: ticks.append(engine.measurements.ticks)
    running.on_start = lambda: engine.submit(one, hearing, clients[1])
    submission = engine.submit(flood, running, clients[0])
    hearing.wait()
    submission.cancel()
    running.wait()
    assert not hearing.errors
    return ticks[0]


def test_a_large_request_delays_a_small_one_by_no_more_than_two_ticks(
    fair: bool, start: Any, model: Any, task: Any, listen: Any
) -> None:
    log = Log(model)
    engine = start(model=log, row_budget=6)
    log.calls.clear()
    large = [task(steps=2, width=LARGE, height=LARGE, seed=seed) for seed in range(6)]
    small = [task(steps=4, width=SMALL, height=SMALL)]
    beside(engine, listen, large, small, [A, A])
    ended = log.calls.index(("decode", SMALL // 8))
    others = [kind for kind, side in log.calls[:ended] if side == LARGE // 8]
    # The small one arrives during the first of them.
    assert (len(others) - 1 <= 2) == fair


def test_a_flood_of_one_client_does_not_hold_up_another(
    fair: bool, start: Any, model: Any, task: Any, listen: Any
) -> None:
    engine = start(row_budget=4)
    flood = [task(steps=4, width=SMALL, height=SMALL, seed=seed) for seed in range(16)]
    before = engine.measurements.ticks
    ended = beside(engine, listen, flood, [task(steps=4, width=SMALL, height=SMALL)], [A, B])
    assert (ended - before <= 2 * 4 + 2) == fair


def test_a_finished_picture_waits_for_no_batch_work_of_another_client(
    start: Any, model: Any, task: Any, listen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.fair_queue.BURST_S", 0.0)
    log = Log(model)
    engine = start(model=log, row_budget=2)
    log.calls.clear()
    batch = task(steps=100, width=SMALL, height=SMALL, priority=Priority.BATCH)
    beside(engine, listen, [batch], [task(steps=10, width=LARGE, height=LARGE)], [A, B])
    sides = [side for _, side in log.calls]
    of_b = [i for i, side in enumerate(sides) if side == LARGE // 8]
    assert len(of_b) == 10 + 1, "ten ticks and a call of the decoder"
    assert sides[of_b[0] :][: len(of_b)] == [LARGE // 8] * len(of_b)
