"""Measure images per second at given numbers of concurrent requests, compared with diffusers.

    python -m benchmarks.at_once                                    # CPU, embedded model
    python -m benchmarks.at_once --architecture sdxl                # GPU, SDXL's sizes
    python -m benchmarks.at_once --architecture z_image --steps 8 --scale 0

Prints Markdown tables, each row as soon as it is measured: diffusers' pipeline with one image after
another; Weft with each number of clients, in the order of ``--counts``; and static batches of as
many images as there are clients. Each client requests one image after another, all with the same
settings, which is the best case for static batches. The table compares with two limits: the rate
that the denoiser alone would allow in eager forward passes of as many rows, and the rate that
denoiser and decoder would allow one after the other. It also shows the fractions of the engine's
time spent in the denoiser and the decoder. Measurements for which there is no time within the
seconds of ``--within`` are left out.

With ``--compile`` both systems are measured again with compiled blocks, minutes later. On a machine
with other load, use ``benchmarks.compiled_blocks`` to see what compilation saves, as it takes
turns.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.allowance import Allowance, add_settle, add_within
from benchmarks.architectures import ARCHITECTURES, build
from benchmarks.peers import Weft, settle
from benchmarks.traffic import Request
from server.models.compiling.compiled_blocks import COMPILE_THRESHOLD
from server.models.compiling.compiler import BlockCompiler
from server.models.compiling.model_blocks import compile_blocks
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.architectures import Architecture
    from benchmarks.peers import Outcome

COUNTS = (1, 2, 4, 8, 16, 32)
TIMINGS = 3
"""Number of timings whose median is used."""

WARM_UP = 2
"""Runs of a pipeline before it is timed: on a GPU the second one is still slow, as kernels are
chosen."""

WARM_UP_STEPS = 2
"""Steps of Weft's images before it is timed: the engine has warmed up its forward passes itself."""

LONG_S = 3.0
"""Seconds of a pipeline's run above which one run is enough warm-up."""

TIMED_IF_LONG = 2
"""Maximum number of such long runs that are timed."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Measurements of a run with some clients.

    Attributes:
        rate: images per second.
        mean_s: mean latency in seconds.
        late_s: 95th percentile of the latency in seconds.
        rows: mean rows of a tick.
        shares: fractions of the time that the engine's thread spent on each kind of work.
    """

    rate: float
    mean_s: float
    late_s: float
    rows: float
    shares: Mapping[str, float]


def main() -> int:
    """Run the clients and print the report; 1 if something failed."""
    options = _options()
    allowance = Allowance(options.within)
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype, allowance.say)
    print(_heading(options), flush=True)
    # Before an engine runs, as an idle engine records graphs on the same device.
    one_by_one = "diffusers, one by one"
    alone = allowance.attempt(one_by_one, partial(_static, architecture, 1, options, allowance))
    if alone is not None:
        print(f"\n{one_by_one}: {alone:.2f} images/s", flush=True)
    weft = Weft(architecture, None)
    allowance.say("engine ready")
    ours = _weft_by_counts(weft, architecture, alone, options, allowance)
    _batches(weft, architecture, ours, alone, options, allowance)
    weft.stop()
    if options.compile:
        _report_compiled(architecture, options, ours, allowance)
    return allowance.report()


def _weft_by_counts(
    weft: Weft,
    architecture: Architecture,
    alone: float | None,
    options: argparse.Namespace,
    allowance: Allowance,
) -> dict[int, RunResult]:
    """Measure each number of clients, and print its row."""
    print(
        "\n| at once | Weft, images/s | mean s | p95 s | of the denoiser's limit "
        "| of both networks' | x one by one | rows a tick | denoiser | decoder | rest |"
        "\n|---|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    ours: dict[int, RunResult] = {}
    for count in options.counts:
        # Weft is no slower than one by one, and often faster.
        least = options.images * count / (alone or inf)
        if not allowance.allows(least, f"Weft, {count} at once"):
            continue
        with weft.undisturbed():
            limits = _limits(architecture, count, options)
        ran = allowance.attempt(
            f"Weft, {count} at once", partial(_weft, weft, count, options, allowance)
        )
        if ran is None:
            continue
        ours[count] = ran
        shares = " | ".join(f"{ran.rate / limit:.2f}" for limit in limits)
        works = " | ".join(f"{share:.0%}" for share in ran.shares.values())
        beside = "" if alone is None else f"{ran.rate / alone:.2f}"
        print(
            f"| {count} | {ran.rate:.2f} | {ran.mean_s:.2f} | {ran.late_s:.2f} "
            f"| {shares} | {beside} | {ran.rows:.1f} | {works} |",
            flush=True,
        )
    return ours


def _batches(
    weft: Weft,
    architecture: Architecture,
    ours: Mapping[int, RunResult],
    alone: float | None,
    options: argparse.Namespace,
    allowance: Allowance,
) -> None:
    """Measure static batches of diffusers, and print their rows."""
    batches = [count for count in options.batches if count in options.counts]
    if batches:
        print("\n| diffusers, batches of | images/s | Weft's is |\n|---|---|---|", flush=True)
    for count in batches:
        longest = 3 * count / (alone or inf)
        if count > 1 and not allowance.allows(longest, f"static batches of {count}"):
            continue
        call = partial(_static, architecture, count, options, allowance)
        with weft.undisturbed():
            rate = alone if count == 1 else allowance.attempt(f"static batches of {count}", call)
        if rate is None:
            continue
        beside = f"{ours[count].rate / rate:.2f} x" if count in ours else ""
        print(f"| {count} | {rate:.2f} | {beside} |", flush=True)


def _report_compiled(
    architecture: Architecture,
    options: argparse.Namespace,
    eager: Mapping[int, RunResult],
    allowance: Allowance,
) -> None:
    """Print the rates of both systems with compiled blocks."""
    ours, shapes, waited_s = _weft_compiled(architecture, options, allowance)
    print(f"\n{shapes} shapes of blocks compiled; Weft's programs took {waited_s:.0f} s.\n")
    print("| at once | Weft, images/s | mean s | p95 s | x eager |\n|---|---|---|---|---|")
    for count, ran in ours.items():
        beside = f"{ran.rate / eager[count].rate:.2f}" if count in eager else ""
        print(
            f"| {count} | {ran.rate:.2f} | {ran.mean_s:.2f} | {ran.late_s:.2f} | {beside} |",
            flush=True,
        )
    architecture.denoiser.compile_repeated_blocks(fullgraph=True)
    allowance.say("diffusers compiles when it first runs")
    alone = _static(architecture, 1, options, allowance)
    beside = ", ".join(f"{ran.rate / alone:.2f} at {count}" for count, ran in ours.items())
    print(f"\ndiffusers, one by one, compiled: {alone:.2f} images/s; x Weft's: {beside}")


def _weft_compiled(
    architecture: Architecture, options: argparse.Namespace, allowance: Allowance
) -> tuple[dict[int, RunResult], int, float]:
    """Results with compiled blocks, the number of compiled shapes, and the seconds that it took."""
    model = architecture.hosted
    with TemporaryDirectory() as temporary:
        compile_blocks(model, BlockCompiler(options.programs or Path(temporary)))
        if model.blocks is None:
            raise RuntimeError(f"nothing is compiled: {model.runs_eager}")
        began = perf_counter()
        weft = Weft(architecture, None)
        # Run until all shapes have been called often enough to be compiled.
        most, called = max(options.counts), weft.forwards
        while weft.forwards < called + COMPILE_THRESHOLD:
            weft.run([_request(options, seed) for seed in range(most)])
        allowance.say("all shapes of blocks are asked for")
        while model.blocks.compilation.waiting:
            if perf_counter() - began > options.wait:
                waiting = model.blocks.compilation.waiting
                raise TimeoutError(f"{waiting} shapes are still being compiled")
            sleep(0.1)
        waited_s = perf_counter() - began
        ours = {count: _weft(weft, count, options, allowance) for count in options.counts}
        shapes = model.blocks.compilation.compiled
        weft.stop()
    model.blocks = None
    return ours, shapes, waited_s


def _weft(weft: Weft, count: int, options: argparse.Namespace, allowance: Allowance) -> RunResult:
    """Run clients that each request a number of images, one after another."""
    few = min(WARM_UP_STEPS, options.steps)
    weft.run([replace(_request(options, seed), steps=few) for seed in range(count)])
    settle(weft.engine, weft.model, options.settle, allowance)
    rounds: list[Outcome] = []
    while len(rounds) < options.rounds and (not rounds or rounds[0].total_s < allowance.left_s):
        with weft.undisturbed():
            rounds.append(weft.follow(_streams(count, options)))
    rates = [count * options.images / one.total_s for one in rounds]
    latencies = [latency for one in rounds for latency in one.latencies]
    total_s = sum(one.total_s for one in rounds)
    works = rounds[0].seconds
    shares = {work: sum(one.seconds[work] for one in rounds) / total_s for work in works}
    ticks = [rows for one in rounds for rows in one.batches]
    late_s = float(np.percentile(latencies, 95))
    return RunResult(median(rates), mean(latencies), late_s, mean(ticks), shares)


def _streams(count: int, options: argparse.Namespace) -> list[list[Request]]:
    images = range(options.images)
    return [[_request(options, client + count * i) for i in images] for client in range(count)]


def _request(options: argparse.Namespace, seed: int) -> Request:
    guidance = "cfg" if options.scale else "none"
    return Request(0.0, "a red circle", options.sampler, guidance, options.steps, seed)


def _static(
    architecture: Architecture, count: int, options: argparse.Namespace, allowance: Allowance
) -> float:
    """Images per second in static batches of ``count`` images."""
    generate = _pipeline_call(architecture, count, options)
    first_s = _seconds(generate)
    allowance.say(f"first batch of {count} of diffusers: {first_s:.1f} s")
    long = first_s > LONG_S
    for _ in range(0 if long else WARM_UP - 1):
        generate()
    rounds = min(options.rounds, TIMED_IF_LONG) if long else options.rounds
    seconds = [_seconds(generate)]
    while len(seconds) < rounds and seconds[0] < allowance.left_s:
        seconds.append(_seconds(generate))
    return count / median(seconds)


def _pipeline_call(
    architecture: Architecture, count: int, options: argparse.Namespace
) -> Callable[[], Any]:
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return lambda: architecture.pipeline(
        ["a red circle"] * count,
        num_inference_steps=options.steps,
        guidance_scale=options.scale,
        width=architecture.side,
        height=architecture.side,
        generator=generators,
        output_type="np",
    )


def _limits(
    architecture: Architecture, count: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Images per second that the denoiser alone would allow, and with the decoder as well."""
    model, side = architecture.hosted, architecture.side
    rows = count * (2 if options.scale else 1)
    with torch.inference_mode():
        [conditioning] = model.encode_prompts(["a red circle"], side, side)
        x = torch.randn(rows, *model.latent_shape(side, side), device=model.device)
        t = torch.full((rows,), 0.5 if model.facts.prediction == "flow" else 500.0)
        t = t.to(model.device)
        inputs = RowInputs(model.stack([conditioning] * rows))

        def forward() -> None:
            # Reading one number synchronizes with the device.
            model.evaluate(x, t, inputs).flatten()[0].item()

        def decode() -> None:
            model.decode(x[:1]).flatten()[0].item()

        forward()
        decode()
        denoised = options.steps * median(_seconds(forward) for _ in range(TIMINGS))
        decoded = count * median(_seconds(decode) for _ in range(TIMINGS))
    return count / denoised, count / (denoised + decoded)


def _seconds(call: Callable[[], Any]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def _heading(options: argparse.Namespace) -> str:
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    return (
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; {options.steps} steps of {options.sampler}, scale {options.scale:g};"
        f" {options.rounds} rounds of {options.images} images for each client"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.at_once")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--batches", type=int, nargs="*", default=COUNTS, help="of diffusers")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0, help="of cfg; 0 is without guidance")
    parser.add_argument("--images", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks, too")
    parser.add_argument("--programs", type=Path, help="folder for them; a temporary one by default")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds for all programs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_within(parser)
    add_settle(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
