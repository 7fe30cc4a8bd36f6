"""Measure the promises and write docs/promises.md.

python -m benchmarks.promises                # all, and the page
python -m benchmarks.promises --only memory  # those whose claims have a word, to the terminal
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final

from benchmarks.promises import (
    access,
    answers,
    costs,
    fairness,
    memory,
    names,
    processes,
    stopping,
)
from benchmarks.promises.promise import WEAK
from benchmarks.promises.time_limit import within
from benchmarks.real_server import KEY, SERVE, served

if TYPE_CHECKING:
    from benchmarks.promises.promise import Measure, Outcome, Promise

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/promises.md"
PROMISES: Final = (
    *access.PROMISES,
    *names.PROMISES,
    *answers.PROMISES,
    *processes.PROMISES,
    *memory.PROMISES,
    *stopping.PROMISES,
    *costs.PROMISES,
    *fairness.PROMISES,
)
STRONG: Final = [*SERVE, "--deterministic", "--row-budget", "8"]
WEAKENED: Final = [*WEAK, "--row-budget", "8", "--max-pending", "65536"]

LIMIT_S: Final = 90.0
"""For one measurement; all take a few seconds on an idle machine."""

HEAD: Final = """# Promises

What the server promises, measured on `weft serve` with the embedded model by `make promises`, which
writes this page. Each measurement is made a second time on a server from which the defence is taken
away, where it has to find the promise broken: a measurement that cannot fail shows nothing. Routes
and fields come from the application's own tables, so that a new one is measured too. Limits are
lower than the defaults where waiting for them would take minutes; docs/operating.md has the limits.

Measured on {cores} cores, with a load average of {load:.1f} by other work before the start.

| promise | how it is measured | target | figure | kept | without | figure then |
|---|---|---|---|---|---|---|
"""


def main() -> int:
    """Measure; returns the status of the process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.promises")
    parser.add_argument("--only", nargs="*", help="words of the claims to measure")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    words = [word.lower() for word in options.only or ("",)]
    chosen = [one for one in PROMISES if any(word in one.claim.lower() for word in words)]
    settings = {**costs.SETTINGS, "WEFT_API_KEYS": f"{KEY},{fairness.OTHER}"}
    measured = _measured([(one.claim, one.measure) for one in chosen], STRONG, settings)
    weakened = {**settings}
    del weakened["WEFT_MAX_PENDING"]
    spoilt = [(one.claim, one.control or one.measure) for one in chosen]
    controls = _measured(spoilt, WEAKENED, weakened)
    lines = [_line(*row) for row in zip(chosen, measured, controls, strict=True)]
    page = HEAD.format(cores=os.cpu_count(), load=load) + "".join(lines)
    if options.only:
        print(page)
    else:
        PAGE.write_text(page)
    kept = all(outcome.kept for outcome in measured)
    noticed = not any(outcome.kept for outcome in controls)
    return 0 if kept and noticed else 1


def _measured(
    measurements: list[tuple[str, Measure]], arguments: list[str], environment: dict[str, str]
) -> list[Outcome]:
    """What each measurement finds on one server, or on another after one that came to no end."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(measurements):
        with served(arguments, **environment) as server:
            for claim, measure in measurements[len(outcomes) :]:
                began = perf_counter()
                outcomes.append(within(LIMIT_S, measure, server))
                seconds = perf_counter() - began
                print(
                    f"{seconds:5.1f} s: {claim} {outcomes[-1].figure}", file=sys.stderr, flush=True
                )
                if outcomes[-1].endless:
                    break
    return outcomes


def _line(promise: Promise, outcome: Outcome, control: Outcome) -> str:
    cells = (
        promise.claim,
        promise.method,
        promise.target,
        outcome.figure,
        "yes" if outcome.kept else "**no**",
        promise.weakness,
        control.figure if not control.kept else f"{control.figure} (**not noticed**)",
    )
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
