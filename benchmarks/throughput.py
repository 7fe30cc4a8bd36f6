"""Compare the throughput of Weft with that of diffusers' pipeline, in one run.

    python -m benchmarks.throughput                                     # CPU, embedded model
    python -m benchmarks.throughput --architecture sd15 --device cuda   # GPU, SD 1.5's sizes
    python -m benchmarks.throughput --mix homogeneous                   # all requests agree
    python -m benchmarks.throughput --cold-starts 10 --busy 1           # ten starts under load

Prints Markdown tables: images a second, mean and 95th percentile latency, their ratios to Weft's,
and the share of the working time outside the denoiser. Each figure is the median over rounds, in
which the systems take turns.
"""

from __future__ import annotations

import argparse
import logging
import platform
from statistics import mean, median, quantiles
from typing import TYPE_CHECKING

import torch

from benchmarks import cold_starts
from benchmarks.architectures import build
from benchmarks.background import busy
from benchmarks.peers import Diffusers, Outcome, Weft
from benchmarks.traffic import homogeneous, mixed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.architectures import Architecture
    from benchmarks.background import Begin
    from benchmarks.traffic import Request

LARGEST_BATCH = 16
"""Images in a static batch of mixed traffic; a guided one is two rows of the forward each."""

U_NETS = ("embedded", "sd15", "sdxl", "tiny_sdxl")
"""Architectures that diffusers has all the samplers for."""

BATCHES = (8, 16, 32)
"""Images in a static batch of homogeneous traffic, each a system of its own."""


def main() -> None:
    """Run the rounds and print the report."""
    options = _options()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype)
    print(_heading(options))
    with busy(options.busy) as begin:
        if options.cold_starts:
            _cold_starts(architecture, options, begin)
        elif options.mix == "homogeneous":
            _homogeneous(architecture, options)
        else:
            _mixed(architecture, options)


def _mixed(architecture: Architecture, options: argparse.Namespace) -> None:
    weft = Weft(architecture, options.row_budget)
    systems: dict[str, Weft | Diffusers] = {
        "weft": weft,
        "one by one": Diffusers(architecture, largest=1),
        "static batches": Diffusers(architecture, largest=LARGEST_BATCH),
    }
    _warm_up(systems, options.steps)
    at_once = mixed(options.requests, options.seed, options.steps, None)
    _describe(at_once)
    outcomes = _rounds(systems, at_once, options.rounds)
    _report("All at once", outcomes, len(at_once))
    rate = options.load * len(at_once) / median(o.total_s for o in outcomes["static batches"])
    poisson = mixed(options.requests, options.seed, options.steps, rate)
    title = f"Poisson arrivals, {rate:.2f} requests/s ({options.load:g} x static batches' rate)"
    _report(title, _rounds(systems, poisson, options.rounds), len(poisson))
    print("\\* rows of a forward for Weft, images of a batch for the pipelines")
    weft.stop()


def _homogeneous(architecture: Architecture, options: argparse.Namespace) -> None:
    weft = Weft(architecture, options.row_budget)
    static = {f"batches of {n}": Diffusers(architecture, largest=n) for n in BATCHES}
    systems: dict[str, Weft | Diffusers] = {"weft": weft, **static}
    requests = homogeneous(options.requests)
    for system in systems.values():
        system.run(requests)
    _describe(requests)
    outcomes = _rounds(systems, requests, options.rounds)
    _report("Homogeneous traffic, all at once", outcomes, len(requests))
    print("\\* rows of a forward for Weft, images of a batch for the pipelines")
    weft.stop()


def _cold_starts(architecture: Architecture, options: argparse.Namespace, begin: Begin) -> None:
    requests = mixed(options.requests, options.seed, options.steps, None)
    _describe(requests)
    cold_starts.compare(
        architecture,
        requests,
        options.cold_starts,
        options.rounds,
        begin,
        lambda weft: _warm_up({"weft": weft}, options.steps),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput")
    parser.add_argument("--architecture", choices=U_NETS, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50, help="largest number of steps in the mix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--load", type=float, default=1.0, help="arrival rate over that of static batches"
    )
    parser.add_argument("--mix", choices=("mixed", "homogeneous"), default="mixed")
    parser.add_argument(
        "--cold-starts", type=int, default=0, help="compare so many cold starts instead"
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="background processes that load the machine"
    )
    parser.add_argument("--row-budget", type=int, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _warm_up(systems: Mapping[str, Weft | Diffusers], most_steps: int) -> None:
    few = mixed(4, 1, min(4, most_steps), None)
    for system in systems.values():
        system.run(few)


def _rounds(
    systems: Mapping[str, Weft | Diffusers], requests: list[Request], rounds: int
) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            outcomes[name].append(system.run(requests))
    return outcomes


def _heading(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return (
        f"{options.architecture}, {options.dtype}, {device or platform.machine()}, "
        f"{options.threads} threads, torch {torch.__version__}; "
        f"{options.busy} other processes; {options.rounds} rounds, seed {options.seed}"
    )


def _describe(requests: list[Request]) -> None:
    kinds = len({request.settings for request in requests})
    rows = sum(request.evaluations for request in requests)
    print(f"{len(requests)} requests of {kinds} settings, {rows} evaluations\n")


def _report(title: str, outcomes: Mapping[str, list[Outcome]], count: int) -> None:
    print(f"### {title}\n")
    print(
        "| system | images/s | Weft's is | mean latency s | x Weft's | p95 s | x Weft's "
        "| outside denoiser | of it decoder | mean batch* |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    figures = {name: [_figures(o, count) for o in runs] for name, runs in outcomes.items()}
    ours = [median(column) for column in zip(*figures["weft"], strict=True)]
    for name in figures:
        rate, average, late, outside, decoder, batch = (
            median(column) for column in zip(*figures[name], strict=True)
        )
        print(
            f"| {name} | {rate:.2f} | {ours[0] / rate:.2f} x | {average:.2f} "
            f"| {average / ours[1]:.2f} | {late:.2f} | {late / ours[2]:.2f} "
            f"| {outside:.1%} | {decoder:.1%} | {batch:.1f} |"
        )
    print()


def _figures(outcome: Outcome, count: int) -> tuple[float, float, float, float, float, float]:
    busy = sum(outcome.seconds.values())
    return (
        count / outcome.total_s,
        mean(outcome.latencies),
        quantiles(outcome.latencies, n=20)[-1],
        1 - outcome.seconds["denoiser"] / busy,
        outcome.seconds["decoder"] / busy,
        mean(outcome.batches),
    )


if __name__ == "__main__":
    main()
