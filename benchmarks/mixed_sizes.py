"""Measure what is saved where pictures of several sizes share forward passes.

    python -m benchmarks.mixed_sizes                          # CPU, tiny Z-Image
    python -m benchmarks.mixed_sizes --architecture z_image   # GPU, Z-Image's sizes

Prints a Markdown table that compares with an engine that keeps sizes apart. Each client requests
one image after another, in a size of its own. Both engines have the same model and alternate by
rounds. On a CPU, processor time of the process is measured, which other programs do not affect.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.allowance import Allowance, add_settle
from benchmarks.architectures import build
from benchmarks.peers import Weft, settle
from benchmarks.traffic import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.models.hosted import HostedModel

SIZES: dict[str, tuple[tuple[float, float], ...]] = {
    "one area": ((1, 1), (9 / 8, 7 / 8), (7 / 8, 9 / 8), (5 / 4, 13 / 16)),
    "1 to 1/2": ((1, 1), (3 / 4, 1), (1, 3 / 4), (1, 1 / 2)),
    "1 to 1/4": ((1, 1), (3 / 4, 3 / 4), (1 / 2, 3 / 4), (1 / 2, 1 / 2)),
}
"""Width and height of pictures, relative to the model's default."""

COUNTS = (2, 4, 8)


class Round(NamedTuple):
    """The result of an engine in one round.

    Attributes:
        rate: images per second.
        forwards: number of forward passes that it took.
    """

    rate: float
    forwards: int


class _SingleSize:
    """A model that declares that a forward pass has only one size."""

    mixes_sizes = False

    def __init__(self, model: HostedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def main() -> None:
    """Run the clients and print the report."""
    options = _options()
    torch.set_num_threads(options.threads)
    allowance = Allowance()
    architecture = build(options.architecture, options.device, options.dtype, allowance.say)
    apart: Any = _SingleSize(architecture.hosted)
    shared = Weft(architecture, None)
    settle(shared.engine, shared.model, options.settle, allowance)
    # Two engines on one GPU would disturb each other's recordings.
    with shared.undisturbed():
        engines = shared, Weft(replace(architecture, hosted=apart), None)
        settle(engines[1].engine, architecture.hosted, options.settle, allowance)
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    print(
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; {options.steps} steps without guidance; medians of {options.rounds} "
        f"rounds of {options.images} images for each client\n"
    )
    print(
        "| sizes | clients | forwards, shared | apart | images/s, shared | apart | x |\n"
        "|---|---|---|---|---|---|---|"
    )
    for named, sizes in SIZES.items():
        pixels = [_pixels(size, architecture.hosted) for size in sizes]
        for count in options.counts:
            with engines[0].undisturbed(), engines[1].undisturbed():
                _report(named, engines, _clients(pixels, count, options), options.rounds)
    for engine in engines:
        engine.stop()


def _pixels(size: tuple[float, float], model: HostedModel) -> tuple[int, int]:
    """Width and height, rounded to the multiples that the model requires."""
    facts = model.facts
    own = facts.default_width, facts.default_height
    width, height = (
        max(1, round(part * side / facts.size_multiple)) * facts.size_multiple
        for part, side in zip(size, own, strict=True)
    )
    return width, height


def _clients(
    sizes: Sequence[tuple[int, int]], count: int, options: argparse.Namespace
) -> list[list[Request]]:
    settings = "a red circle", "euler", "none", options.steps
    return [
        [
            Request(0.0, *settings, client + count * i, sizes[client % len(sizes)])
            for i in range(options.images)
        ]
        for client in range(count)
    ]


def _report(
    named: str, engines: tuple[Weft, Weft], clients: list[list[Request]], rounds: int
) -> None:
    for engine in engines:
        engine.follow(clients)
    ran = [[_round(engine, clients) for engine in engines] for _ in range(rounds)]
    shared, apart = (
        Round(median(one.rate for one in own), round(median(one.forwards for one in own)))
        for own in zip(*ran, strict=True)
    )
    ratio = median(ours.rate / theirs.rate for ours, theirs in ran)
    print(
        f"| {named} | {len(clients)} | {shared.forwards} | {apart.forwards} "
        f"| {shared.rate:.2f} | {apart.rate:.2f} | {ratio:.2f} |",
        flush=True,
    )


def _round(engine: Weft, clients: list[list[Request]]) -> Round:
    clock = perf_counter if torch.cuda.is_available() else process_time
    before, began = engine.forwards, clock()
    latencies = engine.follow(clients).latencies
    return Round(len(latencies) / (clock() - began), engine.forwards - before)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_sizes")
    names = ("tiny_z_image", "z_image")
    parser.add_argument("--architecture", choices=names, default="tiny_z_image")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=4, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_settle(parser, 15.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
