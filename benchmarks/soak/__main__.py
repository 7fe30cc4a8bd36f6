"""Let clients of all kinds come and go for minutes, and measure what they leave behind.

    python -m benchmarks.soak                      # 10 minutes
    python -m benchmarks.soak --minutes 1
    python -m benchmarks.soak --minutes 1 --leak   # a server that leaks, which must be found out

Starts the real server. Clients stall, vanish, flood it, cancel, upload and send nonsense, with
requests and live streams. Memory, file descriptors and threads must not grow after half-time beyond
their limits, and when the clients are gone no image and no stream may be left. Prints one table.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final

from benchmarks.real_server import MIB, SERVE, Served, served
from benchmarks.soak.clients import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LEAKY: Final = ["-m", "benchmarks.soak.leaky"]
OPTIONS: Final = ["--row-budget", "8"]
SETTINGS: Final = {"WEFT_STREAMS__STALL_S": "2", "WEFT_MAX_PENDING": "24"}
CLIENTS: Final = 8
WARM_UP_S: Final = 10.0
SAMPLE_S: Final = 0.5
VISIT_S: Final = 90.0
IDLE_S: Final = 30.0
MEMORY_GROWTH: Final = 0.05
FILES_GROWTH: Final = 5
THREADS_GROWTH: Final = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """The resources of the server's process at one moment.

    Attributes:
        at: time in seconds of a monotonic clock.
        resident: resident memory in bytes, including child processes.
        files: number of open file descriptors.
        threads: number of threads of the process.
        evaluations: number of denoiser evaluations so far.
    """

    at: float
    resident: int
    files: int
    threads: int
    evaluations: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    Attributes:
        name: name of the figure.
        before: value at half-time or at the start.
        after: value at the end.
        limit: limit in words.
        kept: whether the limit is kept; None for figures that are only reported.
    """

    name: str
    before: str
    after: str
    limit: str
    kept: bool | None


def main() -> int:
    """Run the soak test and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leak", action="store_true", help="use a server that leaks on purpose")
    options = parser.parse_args()
    with served([*(LEAKY if options.leak else SERVE), *OPTIONS], **SETTINGS) as server:
        visits, failures, samples = _soaked(server, 60 * options.minutes, Random(options.seed))
        figures = [*_growth(samples), *_left(server), *_broken(server, failures)]
        figures.append(_throughput(samples))
        done = _done(server)
    print(f"{sum(visits.values())} visits in {options.minutes:g} minutes: ", end="")
    print(", ".join(f"{count} {name}" for name, count in sorted(visits.items())) + ".")
    print(f"{done}.")
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}.\n")
    print("| | at half-time | at the end | limit | kept |\n|---|---|---|---|---|")
    words = {True: "yes", False: "**no**", None: ""}
    for one in figures:
        print(f"| {one.name} | {one.before} | {one.after} | {one.limit} | {words[one.kept]} |")
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.leak:
        leaks = ("memory, MiB", "file descriptors", "threads", "streams left")
        found = {one.name for one in figures if one.kept is False}
        return 0 if found >= set(leaks) else 1
    return 1 if any(one.kept is False for one in figures) else 0


def _soaked(
    server: Served, seconds: float, random: Random
) -> tuple[Counter[str], list[str], list[Sample]]:
    """Visits by kind, failures, and samples from the end of the warm-up on."""
    visits: Counter[str] = Counter()
    failures: list[str] = []
    samples: list[Sample] = []
    ended = Event()
    watching = Thread(target=_watch, args=(server, samples, ended))
    watching.start()
    try:
        asyncio.run(_visit(server, WARM_UP_S + seconds, random, visits, failures))
    finally:
        ended.set()
        watching.join()
    return visits, failures, [one for one in samples if one.at >= samples[0].at + WARM_UP_S]


async def _visit(
    server: Served, seconds: float, random: Random, visits: Counter[str], failures: list[str]
) -> None:
    until = monotonic() + seconds

    async def come_and_go(own: Random) -> None:
        while monotonic() < until:
            kind = own.choice(list(KINDS))
            try:
                await asyncio.wait_for(KINDS[kind](server, own), VISIT_S)
            except Exception as error:  # noqa: BLE001  # Any error is reported at the end.
                failures.append(f"{kind}: {type(error).__name__}: {error}")
            visits[kind] += 1

    await asyncio.gather(*(come_and_go(Random(random.random())) for _ in range(CLIENTS)))


def _watch(server: Served, samples: list[Sample], ended: Event) -> None:
    process = Path(f"/proc/{server.process}")
    while not ended.wait(SAMPLE_S):
        # A flood of requests may leave no room for this one.
        with suppress(StopIteration):
            samples.append(
                Sample(
                    at=monotonic(),
                    resident=server.resident(),
                    files=len(list((process / "fd").iterdir())),
                    threads=len(list((process / "task").iterdir())),
                    evaluations=server.metric("weft_evaluations_total"),
                )
            )


def _tenth(samples: Sequence[Sample], number: int) -> Sequence[Sample]:
    """The samples of one tenth of the time."""
    first, last = samples[0].at, samples[-1].at
    begin, end = (first + (last - first) * k / 10 for k in (number, number + 1))
    return [one for one in samples if begin <= one.at <= end]


def _growth(samples: Sequence[Sample]) -> list[Figure]:
    """Growth of resources from the tenth after half-time to the last tenth."""
    before, after = _tenth(samples, 5), _tenth(samples, 9)

    def grew(
        name: str,
        values: Callable[[Sample], int],
        max_growth: int | float,
        unit: int = 1,
        of: Callable[[Iterable[int]], int] = min,
    ) -> Figure:
        first, last = (of(map(values, part)) for part in (before, after))
        limit = f"+{max_growth:.0%}" if isinstance(max_growth, float) else f"+{max_growth}"
        bound = first * (1 + max_growth) if isinstance(max_growth, float) else first + max_growth
        return Figure(name, f"{first / unit:.0f}", f"{last / unit:.0f}", limit, last <= bound)

    # The minimum of memory and files, as the needs of current clients come and go. The maximum of
    # threads: the pool for handlers grows to its 40 in a flood and shrinks after it.
    return [
        grew("memory, MiB", lambda one: one.resident, MEMORY_GROWTH, MIB),
        grew("file descriptors", lambda one: one.files, FILES_GROWTH),
        grew("threads", lambda one: one.threads, THREADS_GROWTH, of=max),
    ]


def _left(server: Served) -> list[Figure]:
    """Images and streams that remain after all clients are gone."""
    until = monotonic() + IDLE_S
    names = {"images left": "weft_queue_images", "streams left": "weft_streams_open"}
    while any(server.metric(metric) for metric in names.values()) and monotonic() < until:
        sleep(SAMPLE_S)
    left = {name: server.metric(metric) for name, metric in names.items()}
    return [Figure(name, "", f"{count:g}", "0", count == 0) for name, count in left.items()]


def _broken(server: Served, failures: Sequence[str]) -> list[Figure]:
    errors = server.log.read_text(errors="replace").count("Traceback")
    return [
        Figure("unexpected answers", "", str(len(failures)), "0", not failures),
        Figure("errors in the log", "", str(errors), "0", errors == 0),
    ]


def _done(server: Served) -> str:
    """The server's work by outcome, from its metrics."""
    counts = re.findall(
        r'^weft_(images|stream_frames)_total{outcome="(\w+)"} ([\d.]+)',
        server.ask("GET", "/metrics")[2].decode(),
        re.MULTILINE,
    )
    return ", ".join(
        f"{name.replace('_', ' ')} {how} {float(count):g}" for name, how, count in counts
    )


def _throughput(samples: Sequence[Sample]) -> Figure:
    """Evaluations per second, which other load on the machine also affects."""
    first, last = (
        (part[-1].evaluations - part[0].evaluations) / (part[-1].at - part[0].at)
        for part in (_tenth(samples, 0), _tenth(samples, 9))
    )
    return Figure(
        "evaluations/s, first and last tenth",
        f"{first:.1f}",
        f"{last:.1f}",
        f"reported: {last / first:.2f} x",
        None,
    )


if __name__ == "__main__":
    sys.exit(main())
