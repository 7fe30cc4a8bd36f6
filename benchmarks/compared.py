"""Alternating runs of Weft and diffusers' pipelines, each printed as soon as it is measured."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import partial
from statistics import mean, median, quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Final

from benchmarks.peers import settle

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from benchmarks.allowance import Allowance
    from benchmarks.peers import Diffusers, Outcome, Weft
    from benchmarks.traffic import Request

__all__ = ["Compared", "Figures"]

OURS: Final = "weft"

SPARE: Final = 1.3
"""Factor on the duration of the last run for which there must be time before a run is started."""

MIN_REMAINING_S: Final = 5.0
"""Minimum remaining seconds for which a run of a pipeline is started."""

SHARE_OF_TIME: Final = 0.6
"""Fraction of the remaining time that one run of a pipeline may take."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures that a table shows for one run, or for the median of several.

    Attributes:
        rate: images per second.
        average: mean latency in seconds.
        late: 95th percentile of the latency in seconds.
        outside: fraction of the working time spent outside the denoiser.
        decoder: fraction of the working time spent in the decoder.
        batch: mean rows of a tick, or images of a batch.
        share: fraction of the evaluations that was done.
    """

    rate: float
    average: float
    late: float
    outside: float
    decoder: float
    batch: float
    share: float

    @classmethod
    def of(cls, outcome: Outcome, count: int) -> Figures:
        """The figures of a run of ``count`` requests."""
        busy = sum(outcome.seconds.values())
        # A percentile needs at least two latencies.
        latencies = outcome.latencies * 2
        return cls(
            count * outcome.share / outcome.total_s,
            mean(latencies),
            quantiles(latencies, n=20)[-1],
            1 - outcome.seconds["denoiser"] / busy,
            outcome.seconds["decoder"] / busy,
            mean(outcome.batches),
            outcome.share,
        )

    @classmethod
    def median(cls, runs: Sequence[Figures]) -> Figures:
        """The median of each figure over runs."""
        return cls(*map(median, zip(*map(astuple, runs), strict=True)))


class Compared:
    """Weft and pipelines, which run while Weft's engine is idle.

    Args:
        weft: the engine.
        pipelines: pipelines by name, in decreasing order of importance.
        few: requests that warm up each system before its first run.
        options: the command's options; uses ``rounds`` and ``settle``.
        allowance: time limit of the benchmark.
    """

    def __init__(
        self,
        weft: Weft,
        pipelines: Mapping[str, Diffusers],
        few: list[Request],
        options: argparse.Namespace,
        allowance: Allowance,
    ) -> None:
        self._weft = weft
        self._pipelines = pipelines
        self._few = few
        self._rounds: int = options.rounds
        self._allowance = allowance
        self._warm: set[str] = set()
        self._cut = False
        weft.run(few)
        settle(weft.engine, weft.model, options.settle, allowance)

    def table(self, title: str, requests: list[Request]) -> dict[str, Figures]:
        """Run all systems in turns and print a table.

        Args:
            title: title of the table.
            requests: requests of each run.

        Returns:
            The medians of each system that ran at all.
        """
        measured: dict[str, list[Figures]] = {}
        for number in range(1, self._rounds + 1):
            named = f"{title}, round {number}" if self._rounds > 1 else title
            if not self._may_begin(named, requests, measured.get(OURS)):
                break
            _print_head(named)
            for name in (OURS, *self._pipelines):
                called = f"{title}: {name}"
                run = partial(self._run, name, requests, called)
                # An error of Weft is raised, as nothing could be compared with it.
                ran = run() if name == OURS else self._allowance.attempt(called, run)
                if ran is not None:
                    measured.setdefault(name, []).append(ran)
                    _print_row(name, ran, measured[OURS][-1])
        medians = {name: Figures.median(runs) for name, runs in measured.items()}
        if any(len(runs) > 1 for runs in measured.values()):
            _print_head(f"{title}, medians")
            for name, figures in medians.items():
                _print_row(name, figures, medians[OURS])
        return medians

    def explain(self) -> None:
        """Print the meaning of the signs in the tables."""
        print("\n\\* rows of a forward for Weft, images of a batch for the pipelines", flush=True)
        if self._cut:
            print(
                "\n† cut off after this share of the evaluations, whose rate it has; the latencies "
                "are those of the images until then",
                flush=True,
            )

    def _may_begin(self, title: str, requests: list[Request], before: list[Figures] | None) -> bool:
        seconds = requests[-1].arrival_s
        if before is not None:
            seconds = max(seconds, len(requests) / before[-1].rate)
        return self._allowance.allows(SPARE * seconds, title)

    def _run(self, name: str, requests: list[Request], called: str) -> Figures | None:
        with self._weft.undisturbed():
            if name == OURS:
                return Figures.of(self._weft.run(requests), len(requests))
            if not self._allowance.allows(MIN_REMAINING_S, called):
                return None
            last = name == [*self._pipelines][-1]
            max_s = self._allowance.left_s * (1 if last else SHARE_OF_TIME)
            until, pipeline = perf_counter() + max_s, self._pipelines[name]
            if name not in self._warm:
                pipeline.run(self._few, until)
                self._warm.add(name)
                self._allowance.say(f"{name} is warm")
            ran = Figures.of(pipeline.run(requests, until), len(requests))
        self._cut |= ran.share < 1
        return ran


def _print_head(title: str) -> None:
    print(f"\n### {title}\n")
    print(
        "| system | images/s | Weft's is | mean latency s | x Weft's | p95 s | x Weft's "
        "| outside denoiser | of it decoder | mean batch* |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)


def _print_row(name: str, own: Figures, ours: Figures) -> None:
    cut = "" if own.share == 1 else f", {own.share:.0%}†"
    print(
        f"| {name}{cut} | {own.rate:.2f} | {ours.rate / own.rate:.2f} x | {own.average:.2f} "
        f"| {own.average / ours.average:.2f} | {own.late:.2f} | {own.late / ours.late:.2f} "
        f"| {own.outside:.1%} | {own.decoder:.1%} | {own.batch:.1f} |",
        flush=True,
    )
