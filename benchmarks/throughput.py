"""Compare the throughput of Weft with that of diffusers' pipeline, in one run.

    python -m benchmarks.throughput                                     # CPU, embedded model
    python -m benchmarks.throughput --architecture sd15 --device cuda   # GPU, SD 1.5's sizes
    python -m benchmarks.throughput --mix homogeneous                   # all requests agree
    python -m benchmarks.throughput --cold-starts 10 --busy 1           # ten starts under load

Prints Markdown tables: images per second, mean and 95th percentile latency, their ratios to Weft's,
and the fraction of the working time outside the denoiser. The systems take turns, each row is
printed as soon as it is measured, and if there are several rounds there is a table of their
medians. Measurements for which there is no time within the seconds of ``--within`` are left out;
the rate of a pipeline that was cut off is computed from the evaluations that it did.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from typing import TYPE_CHECKING

import torch

from benchmarks import cold_starts
from benchmarks.allowance import Allowance, add_settle, add_within
from benchmarks.architectures import build
from benchmarks.background import busy
from benchmarks.compared import Compared
from benchmarks.peers import Diffusers, Weft
from benchmarks.traffic import homogeneous, mixed

if TYPE_CHECKING:
    from benchmarks.architectures import Architecture
    from benchmarks.background import Begin
    from benchmarks.traffic import Request

MAX_BATCH = 16
"""Images in a static batch of mixed traffic; a guided image is two rows of the forward pass."""

U_NETS = ("embedded", "sd15", "sdxl", "tiny_sdxl")
"""Architectures for which diffusers has all the samplers."""

BATCHES = (8, 16, 32)
"""Numbers of images in a static batch of homogeneous traffic; each is measured as one system."""


def main() -> int:
    """Run the rounds and print the report; 1 if something failed."""
    options = _options()
    allowance = Allowance(options.within)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype, allowance.say)
    print(_heading(options), flush=True)
    with busy(options.busy) as begin:
        if options.cold_starts:
            _cold_starts(architecture, options, begin)
        elif options.mix == "homogeneous":
            _homogeneous(architecture, options, allowance)
        else:
            _mixed(architecture, options, allowance)
    return allowance.report()


def _mixed(architecture: Architecture, options: argparse.Namespace, allowance: Allowance) -> None:
    weft = Weft(architecture, options.row_budget)
    allowance.say("engine ready")
    systems = {
        "one by one": Diffusers(architecture, largest=1),
        "static batches": Diffusers(architecture, largest=MAX_BATCH),
    }
    few = mixed(4, 1, min(4, options.steps), None)
    at_once = mixed(options.requests, options.seed, options.steps, None)
    compared = Compared(weft, systems, few, options, allowance)
    _describe(at_once)
    static = compared.table("All at once", at_once).get("static batches")
    if static is not None:
        rate = options.load * static.rate
        poisson = mixed(options.requests, options.seed, options.steps, rate)
        load = f"({options.load:g} x static batches' rate)"
        compared.table(f"Poisson arrivals, {rate:.2f} requests/s {load}", poisson)
    compared.explain()
    weft.stop()


def _homogeneous(
    architecture: Architecture, options: argparse.Namespace, allowance: Allowance
) -> None:
    weft = Weft(architecture, options.row_budget)
    allowance.say("engine ready")
    systems = {f"batches of {n}": Diffusers(architecture, largest=n) for n in BATCHES}
    requests = homogeneous(options.requests)
    compared = Compared(weft, systems, requests, options, allowance)
    _describe(requests)
    compared.table("Homogeneous traffic, all at once", requests)
    compared.explain()
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
        lambda weft: weft.run(mixed(4, 1, min(4, options.steps), None)),
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
    add_within(parser)
    add_settle(parser)
    return parser.parse_args()


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
    print(f"{len(requests)} requests of {kinds} settings, {rows} evaluations", flush=True)


if __name__ == "__main__":
    sys.exit(main())
