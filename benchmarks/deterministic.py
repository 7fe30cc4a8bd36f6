"""Measure the cost of bit-identical images: an engine in deterministic mode and one that is not.

    python -m benchmarks.deterministic                       # CPU, embedded model
    python -m benchmarks.deterministic --architecture sd15   # GPU, SD 1.5's sizes

Prints a Markdown table. Each client requests one guided image after another, with one of four
samplers. Both engines have the same model and alternate by rounds. On a CPU, processor time of the
process is measured, which other programs do not affect.
"""

from __future__ import annotations

import argparse
import platform
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING

import torch

from benchmarks.allowance import Allowance, add_settle
from benchmarks.architectures import ARCHITECTURES, build
from benchmarks.peers import Weft, settle
from benchmarks.traffic import SAMPLERS, Request

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

COUNTS = (1, 4, 8, 16)


def main() -> None:
    """Run the clients and print the report."""
    options = _options()
    torch.set_num_threads(options.threads)
    allowance = Allowance()
    architecture = build(options.architecture, options.device, options.dtype, allowance.say)
    ordinary = Weft(architecture, None)
    with ordinary.undisturbed():
        engines = ordinary, Weft(architecture, None, deterministic=True)
    allowance.say("both engines ready")
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    print(
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; {options.steps} steps of {', '.join(SAMPLERS)} with cfg; medians of "
        f"{options.rounds} rounds of {options.images} images for each client; "
        f"{engines[1].engine.measurements.fixed_rows} rows in every deterministic forward\n"
    )
    print("| at once | images/s | deterministic, images/s | seconds x |\n|---|---|---|---|")
    for count in options.counts:
        clients = _clients(count, options)
        for engine in engines:
            engine.follow(clients)
        for engine in engines:
            with _undisturbed(other for other in engines if other is not engine):
                settle(engine.engine, engine.model, options.settle, allowance)
        with _undisturbed(engines):
            _report(engines, clients, options.rounds)
    for engine in engines:
        engine.stop()


@contextmanager
def _undisturbed(engines: Iterable[Weft]) -> Generator[None]:
    """Let these engines do nothing but ticks: their preparation would take time of the other."""
    with ExitStack() as held:
        for engine in engines:
            held.enter_context(engine.undisturbed())
        yield


def _clients(count: int, options: argparse.Namespace) -> list[list[Request]]:
    return [
        [
            Request(
                0.0,
                "a red circle",
                SAMPLERS[client % len(SAMPLERS)],
                "cfg",
                options.steps,
                seed=client + count * i,
            )
            for i in range(options.images)
        ]
        for client in range(count)
    ]


def _report(engines: tuple[Weft, Weft], clients: list[list[Request]], rounds: int) -> None:
    ran = [[_rate(engine, clients) for engine in engines] for _ in range(rounds)]
    ordinary, deterministic = (median(own) for own in zip(*ran, strict=True))
    price = median(one / other for one, other in ran)
    print(
        f"| {len(clients)} | {ordinary:.2f} | {deterministic:.2f} | {price:.2f} |",
        flush=True,
    )


def _rate(engine: Weft, clients: list[list[Request]]) -> float:
    """Images per second."""
    clock = perf_counter if torch.cuda.is_available() else process_time
    began = clock()
    return len(engine.follow(clients).latencies) / (clock() - began)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deterministic")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=3, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_settle(parser, 15.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
