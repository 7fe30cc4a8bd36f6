"""Measure the cost of a tick outside the denoiser by its number of rows.

This includes plans, guidance, the selection of images and accounting.

    python -m benchmarks.tick_costs                         # CPU, embedded model
    python -m benchmarks.tick_costs --architecture sd15     # GPU, SD 1.5's sizes

Prints a Markdown table: milliseconds of a tick in the denoiser and outside it, from its start to
that of the next one, and the number of device operations outside the denoiser. The figures are
medians over full ticks; those in which images come and go are not full.
"""

from __future__ import annotations

import argparse
import platform
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from benchmarks.allowance import Allowance, add_settle, add_within
from benchmarks.architectures import ARCHITECTURES, build
from benchmarks.operation_count import OperationCount
from benchmarks.peers import Filled, Weft, settle
from benchmarks.traffic import SAMPLERS, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = (1, 4, 8, 32)
"""Rows of ticks; on a GPU passes of up to 12 rows are replayed and leave the host least time."""

BRANCHES = {"none": 1, "cfg": 2, "apg": 2}

COUNTED_STEPS = 8
"""Steps of the images for which operations are counted, which is slow and hardly varies."""

MIN_TICKS = 3
"""Minimum number of full ticks; the first ticks are not full, as images arrive one by one."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick that has run.

    Attributes:
        rows: rows of its forward pass.
        inside_s: seconds in the denoiser.
        outside_s: seconds outside the denoiser.
        operations: number of device operations outside the denoiser; None if not counted.
    """

    rows: int
    inside_s: float
    outside_s: float
    operations: int | None


class WatchedTicks(Filled):
    """An engine that records its ticks.

    Attributes:
        seen: ticks so far.
        count: counter of the operations of ticks; None while they are not counted.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.seen: list[Tick] = []
        self.count: OperationCount | None = None

    @override
    def _tick(self) -> None:
        measured, count = self.measurements, self.count
        rows, inside_s, before = measured.evaluations, measured.denoise_s, count and count.total
        began = perf_counter()
        with count or nullcontext():
            super()._tick()
        seconds, inside_s = perf_counter() - began, measured.denoise_s - inside_s
        operations = None if count is None else count.total - (before or 0)
        rows = measured.evaluations - rows
        self.seen.append(Tick(rows, inside_s, seconds - inside_s, operations))


def main() -> int:
    """Run the images and print the report; 1 if something failed."""
    options = _options()
    torch.set_num_threads(options.threads)
    allowance = Allowance(options.within)
    architecture = build(options.architecture, options.device, options.dtype, allowance.say)
    weft = Weft(architecture, max(options.rows), kind=WatchedTicks)
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    print(
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; {options.steps} steps of {', '.join(SAMPLERS)}\n"
    )
    print(
        "| guidance | rows | denoiser, ms a tick | outside it, ms | share | operations |\n"
        "|---|---|---|---|---|---|"
    )
    longest_s = 0.0
    sizes: list[int] = options.rows
    for guidance, rows in product(BRANCHES, sizes):
        what = f"{guidance}, {rows} rows"
        if rows < BRANCHES[guidance] or not allowance.allows(longest_s, what):
            continue
        began = perf_counter()
        allowance.attempt(what, partial(_measure, weft, guidance, rows, options, allowance))
        longest_s = max(longest_s, perf_counter() - began)
    weft.stop()
    return allowance.report()


def _measure(
    weft: Weft, guidance: str, rows: int, options: argparse.Namespace, allowance: Allowance
) -> None:
    """Measure, and print a row of the report."""
    images = rows // BRANCHES[guidance]
    weft.run(_requests(images, guidance, 2))
    settle(weft.engine, weft.model, options.settle, allowance)
    timed = _ticks(weft, rows, _requests(images, guidance, options.steps))
    counted = _counted(weft, rows, _requests(images, guidance, COUNTED_STEPS))
    _report(guidance, rows, timed, counted)


def _requests(count: int, guidance: str, steps: int) -> list[Request]:
    return [
        Request(0.0, "a red circle", SAMPLERS[i % len(SAMPLERS)], guidance, steps, i)
        for i in range(count)
    ]


def _ticks(weft: Weft, rows: int, requests: list[Request]) -> list[Tick]:
    """The full ticks of a run."""
    engine: Any = weft.engine
    engine.seen = []
    with weft.undisturbed():
        weft.run(requests)
    seen: list[Tick] = list(engine.seen)
    full = [tick for tick in seen if tick.rows == rows]
    if len(full) < MIN_TICKS:
        raise RuntimeError(f"only {len(full)} of {len(seen)} ticks had {rows} rows")
    return full


def _counted(weft: Weft, rows: int, requests: list[Request]) -> list[Tick]:
    """The full ticks of a run, with their operations counted except those of the denoiser."""
    engine: Any = weft.engine
    model: Any = weft.model
    evaluate, engine.count = model.evaluate, OperationCount()
    model.evaluate = engine.count.leaving_out(evaluate)
    try:
        return _ticks(weft, rows, requests)
    finally:
        model.evaluate, engine.count = evaluate, None


def _report(guidance: str, rows: int, timed: Sequence[Tick], counted: Sequence[Tick]) -> None:
    inside = 1000 * median(tick.inside_s for tick in timed)
    outside = 1000 * median(tick.outside_s for tick in timed)
    operations = median(tick.operations or 0 for tick in counted)
    share = outside / (inside + outside)
    print(
        f"| {guidance} | {rows} | {inside:.1f} | {outside:.2f} | {share:.1%} | {operations:.0f} |",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tick_costs")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_within(parser)
    add_settle(parser, 10.0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
