"""How many images a second there are with so many requests at once, beside diffusers.

    python -m benchmarks.at_once                                    # CPU, embedded model
    python -m benchmarks.at_once --architecture sdxl                # GPU, SDXL's sizes
    python -m benchmarks.at_once --architecture z_image --steps 8 --scale 0

Prints a Markdown table. Clients ask for one image after another, with settings that agree: the best
case of static batches. diffusers' pipeline makes one image after another, eager and if asked for
compiled, and static batches of as many images as there are clients. The limit is what the denoiser
alone would allow in forward passes of as many rows.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.architectures import ARCHITECTURES, build
from benchmarks.peers import Weft
from benchmarks.traffic import Request
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.architectures import Architecture

COUNTS = (1, 2, 4, 8, 16, 32)
TIMINGS = 3
"""Of which the median counts."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What some clients got.

    Attributes:
        rate: images a second.
        mean_s: mean latency.
        late_s: 95th percentile of the latency.
    """

    rate: float
    mean_s: float
    late_s: float


def main() -> None:
    """Run the clients and print the report."""
    options = _options()
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype)
    weft = Weft(architecture, None)
    print(_heading(options))
    static = [
        _static(architecture, count, options)
        for count in options.counts
        if count in options.batches
    ]
    batches = dict(zip([n for n in options.counts if n in options.batches], static, strict=True))
    alone = batches.get(1) or _static(architecture, 1, options)
    ours = {count: _weft(weft, count, options) for count in options.counts}
    weft.stop()
    limits = {count: _limit(architecture, count, options) for count in options.counts}
    print(
        "\n| at once | Weft, images/s | mean s | p95 s | of the denoiser's limit "
        "| x one by one | x static batches of as many |\n|---|---|---|---|---|---|---|"
    )
    for count, ran in ours.items():
        beside = f"{ran.rate / batches[count]:.2f}" if count in batches else ""
        print(
            f"| {count} | {ran.rate:.2f} | {ran.mean_s:.2f} | {ran.late_s:.2f} "
            f"| {ran.rate / limits[count]:.2f} | {ran.rate / alone:.2f} | {beside} |"
        )
    print(f"\ndiffusers, one by one: {alone:.2f} images/s")
    if options.compile:
        print(f"the same, its denoiser compiled: {_compiled(architecture, options):.2f} images/s")


def _weft(weft: Weft, count: int, options: argparse.Namespace) -> Ran:
    """Clients that ask for the next image when they have one, each for so many."""
    weft.run([_request(options, seed) for seed in range(count)])
    rounds = [weft.follow(_streams(count, options)) for _ in range(options.rounds)]
    rates = [count * options.images / total_s for total_s, _ in rounds]
    latencies = [one for _, some in rounds for one in some]
    return Ran(median(rates), mean(latencies), float(np.percentile(latencies, 95)))


def _streams(count: int, options: argparse.Namespace) -> list[list[Request]]:
    images = range(options.images)
    return [[_request(options, client + count * i) for i in images] for client in range(count)]


def _request(options: argparse.Namespace, seed: int) -> Request:
    guidance = "cfg" if options.scale else "none"
    return Request(0.0, "a red circle", options.sampler, guidance, options.steps, seed)


def _static(architecture: Architecture, count: int, options: argparse.Namespace) -> float:
    """Images a second of batches of so many images."""
    generate = _pipeline_call(architecture, count, options)
    generate()
    return count / median(_seconds(generate) for _ in range(options.rounds))


def _compiled(architecture: Architecture, options: argparse.Namespace) -> float:
    """Images a second, one by one, once the denoiser's repeated blocks are compiled."""
    architecture.denoiser.compile_repeated_blocks(fullgraph=True)
    return _static(architecture, 1, options)


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


def _limit(architecture: Architecture, count: int, options: argparse.Namespace) -> float:
    """Images a second if there were the denoiser alone, with the rows of so many images."""
    model, side = architecture.hosted, architecture.side
    rows = count * (2 if options.scale else 1)
    with torch.inference_mode():
        [told] = model.encode_prompts(["a red circle"], side, side)
        x = torch.randn(rows, *model.latent_shape(side, side), device=model.device)
        t = torch.full((rows,), 0.5 if model.facts.prediction == "flow" else 500.0)
        t = t.to(model.device)
        inputs = RowInputs(model.stack([told] * rows))

        def forward() -> None:
            # Reading one number waits for the device.
            model.evaluate(x, t, inputs).flatten()[0].item()

        forward()
        seconds = median(_seconds(forward) for _ in range(TIMINGS))
    return count / (options.steps * seconds)


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
    parser.add_argument("--compile", action="store_true", help="compile diffusers' denoiser, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
