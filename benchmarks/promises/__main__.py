"""Measure the promises and write docs/promises.md.

python -m benchmarks.promises                # all
python -m benchmarks.promises --only memory  # those whose claims have a word; the others stay
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
from benchmarks.promises.page import line, page
from benchmarks.promises.promise import WEAK
from benchmarks.promises.rest import comes_to_rest
from benchmarks.promises.time_limit import within
from benchmarks.real_server import KEY, SERVE, served

if TYPE_CHECKING:
    from benchmarks.promises.promise import Measure, Outcome

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/promises.md"
PROMISES: Final = (
    *access.PROMISES,
    *names.PROMISES,
    *answers.PROMISES,
    *processes.PROMISES,
    *memory.PROMISES,
    *stopping.PROMISES,
    *fairness.PROMISES,
    *costs.PROMISES,
)
STRONG: Final = [*SERVE, "--deterministic", "--row-budget", "8"]
REST_S: Final = 5.0
"""Seconds that a server has to finish leftovers of a measurement; else a new one is started."""

WEAKENED: Final = [*WEAK, "--row-budget", "8", "--max-pending", "65536"]


def main() -> int:
    """Measure the promises and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.promises")
    parser.add_argument("--only", nargs="*", help="words of the claims to measure")
    parser.add_argument(
        "--limit",
        type=float,
        default=90.0,
        metavar="SECONDS",
        help="for one measurement; all take a few seconds on an idle machine",
    )
    options = parser.parse_args()
    load = os.getloadavg()[0]
    words = [word.lower() for word in options.only or ("",)]
    chosen = [one for one in PROMISES if any(word in one.claim.lower() for word in words)]
    settings = {**costs.SETTINGS, "WEFT_API_KEYS": f"{KEY},{fairness.OTHER}"}
    plain = [(one.claim, one.measure) for one in chosen]
    measured = _measured(plain, options.limit, STRONG, settings)
    weakened = {**settings}
    del weakened["WEFT_MAX_PENDING"]
    spoilt = [(one.claim, one.control or one.measure) for one in chosen]
    controls = _measured(spoilt, options.limit, WEAKENED, weakened)
    rows = zip(chosen, measured, controls, strict=True)
    PAGE.write_text(page(PROMISES, [line(*row, load) for row in rows], PAGE.read_text()))
    kept = all(outcome.kept for outcome in measured)
    noticed = not any(outcome.kept for outcome in controls)
    return 0 if kept and noticed else 1


def _measured(
    measurements: list[tuple[str, Measure]],
    limit_s: float,
    arguments: list[str],
    environment: dict[str, str],
) -> list[Outcome]:
    """The outcome of each measurement, on an otherwise idle server.

    The server of the previous measurement is reused if that measurement ended and the server came
    to rest.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(measurements):
        with served(arguments, **environment) as server:
            for claim, measure in measurements[len(outcomes) :]:
                began = perf_counter()
                outcomes.append(within(limit_s, measure, server))
                seconds = perf_counter() - began
                print(
                    f"{seconds:5.1f} s: {claim} {outcomes[-1].figure}", file=sys.stderr, flush=True
                )
                if outcomes[-1].endless or not comes_to_rest(server, REST_S):
                    server.kill()
                    break
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
