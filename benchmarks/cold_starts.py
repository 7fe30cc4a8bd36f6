"""Newly started engines compared with one that fills every tick up to the best fixed budget.

On a shared machine, speed varies over time by more than the two systems differ. They therefore take
turns under the same background load, and the total time of all turns is compared.
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
"""Fixed row budgets among which the best is determined."""

QUALIFYING = 3
"""Turns of every budget to determine the best one."""


def compare(
    architecture: Architecture,
    requests: list[Request],
    starts: int,
    turns: int,
    begin: Begin,
    warm_up: Callable[[Weft], object],
) -> None:
    """Print a table of several starts, with the worst and the median of them.

    Args:
        architecture: the model.
        requests: requests of a turn.
        starts: number of engines to start.
        turns: number of turns for each start and for the best budget compared with it.
        begin: restarts the background load with a seed.
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
                # The order alternates.
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
            # Two engines on one GPU would disturb each other's recordings.
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
    """Images per second over all turns."""
    return len(requests) * len(outcomes) / sum(outcome.total_s for outcome in outcomes)
