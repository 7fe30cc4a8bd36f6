"""Measure what a tiny autoencoder saves: Stable Diffusion's full one beside one of TAESD's sizes.

    python -m benchmarks.autoencoders

Prints a Markdown table. The weights are random, on which speed does not depend. Calls of the two
alternate, so that other work on the machine slows both alike.
"""

from __future__ import annotations

import argparse
import platform
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from benchmarks.peers import wait_for_stream
from benchmarks.random_models import sd15_autoencoder
from server.models.autoencoder import Autoencoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LATENT_CHANNELS = 4
CELL = 8


def main() -> None:
    """Time both halves of both autoencoders, and print the table."""
    options = _options()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    full, tiny = (
        Autoencoder(sd15_autoencoder(device, dtype, taesd=taesd), device) for taesd in (False, True)
    )
    shape = options.pictures, LATENT_CHANNELS, options.side // CELL, options.side // CELL
    latents = torch.randn(shape, device=device)
    pixels = torch.rand(options.pictures, 3, options.side, options.side, device=device) * 2 - 1
    machine = platform.processor() or platform.machine()
    print(
        f"{options.pictures} of {options.side} px, {options.dtype}, "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else machine}, {options.threads} "
        f"threads, torch {torch.__version__}, median of {options.rounds} alternating calls\n\n"
        "| half | full, ms | tiny, ms | tiny / full |\n|---|---|---|---|"
    )
    with torch.inference_mode():
        for half, given in (("encode", pixels), ("decode", latents)):
            calls = getattr(full, half), getattr(tiny, half)
            seconds, saved = _alternating(calls, given, options.rounds)
            print(f"| {half} | {1000 * seconds:.1f} | {1000 * saved:.1f} | {saved / seconds:.3f} |")


def _alternating(
    calls: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    given: Tensor,
    rounds: int,
) -> tuple[float, float]:
    """Median seconds of both calls; the first round does not count."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(1 + rounds):
        for call, own in zip(calls, taken, strict=True):
            wait_for_stream()
            began = perf_counter()
            call(given)
            wait_for_stream()
            if number:
                own.append(perf_counter() - began)
    return median(taken[0]), median(taken[1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
