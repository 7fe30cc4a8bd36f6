"""Engines that just started, beside one that fills every tick up to the best fixed budget.

A machine that others use is faster at one moment than at the next by more than the two differ. So
they take turns, both meet the same background load, and what is compared is the time of all turns.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import mean, median
from typing import TYPE_CHECKING

from benchmarks.peers import Filled, Weft

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.architectures import Architecture
    from benchmarks.background import Begin
    from benchmarks.peers import Outcome
    from benchmarks.traffic import Request

BUDGETS = (8, 16, 32, 64, 128)
"""Rows of a tick that cold starts are compared with."""

QUALIFYING = 3
"""Turns of every budget, which show the best of them."""


def compare(
    architecture: Architecture,
    requests: list[Request],
    starts: int,
    turns: int,
    begin: Begin,
    warm_up: Callable[[Weft], object],
) -> None:
    """Print a table of so many starts, and the worst and the median of them.

    Args:
        architecture: the model.
        requests: of a turn.
        starts: engines to start.
        turns: of each start and of the best budget beside it.
        begin: begins the background load anew from a seed.
        warm_up: runs a few requests.
    """
    best = _best_budget(architecture, requests, begin, warm_up)
    filled = Weft(architecture, best, kind=Filled)
    warm_up(filled)
    print(f"| start | images/s | of it first turn | mean rows | {best} rows, images/s | share |")
    print("|---|---|---|---|---|---|")
    shares: list[float] = []
    for start in range(starts):
        ours: list[Outcome] = []
        theirs: list[Outcome] = []
        with filled.undisturbed():
            begin(start)
            weft = Weft(architecture, None)
            warm_up(weft)
            for turn in range(turns):
                pair = [(weft, ours), (filled, theirs)]
                # Neither is always the first.
                for system, outcomes in pair[:: 1 if turn % 2 else -1]:
                    begin(1000 * start + turn)
                    outcomes.append(system.run(requests))
            weft.stop()
        shares.append(_rate(ours, requests) / _rate(theirs, requests))
        rows = mean(rows for outcome in ours for rows in outcome.batches)
        print(
            f"| {start + 1} | {_rate(ours, requests):.2f} | {_rate(ours[:1], requests):.2f} "
            f"| {rows:.1f} | {_rate(theirs, requests):.2f} | {shares[-1]:.2f} |",
            flush=True,
        )
    print(f"\nworst {min(shares):.2f}, median {median(shares):.2f} of the best budget's rate")
    filled.stop()


def _best_budget(
    architecture: Architecture,
    requests: list[Request],
    begin: Begin,
    warm_up: Callable[[Weft], object],
) -> int:
    outcomes: dict[int, list[Outcome]] = {rows: [] for rows in BUDGETS}
    systems: dict[int, Weft] = {}
    with ExitStack() as undisturbed:
        for rows in BUDGETS:
            systems[rows] = Weft(architecture, rows, kind=Filled)
            warm_up(systems[rows])
            # Two engines of one GPU would spoil each other's recordings.
            undisturbed.enter_context(systems[rows].undisturbed())
        for turn in range(QUALIFYING):
            for rows, system in systems.items():
                begin(turn)
                outcomes[rows].append(system.run(requests))
    for system in systems.values():
        system.stop()
    rates = {rows: _rate(outcomes[rows], requests) for rows in BUDGETS}
    print("| rows of a tick |", " | ".join(map(str, rates)), "|")
    print("|---|" + "---|" * len(rates))
    print("| images/s |", " | ".join(f"{rate:.2f}" for rate in rates.values()), "|\n", flush=True)
    return max(rates, key=lambda rows: rates[rows])


def _rate(outcomes: list[Outcome], requests: list[Request]) -> float:
    """Images a second over all turns."""
    return len(requests) * len(outcomes) / sum(outcome.total_s for outcome in outcomes)
