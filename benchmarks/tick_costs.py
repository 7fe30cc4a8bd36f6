"""What plans and guidance cost beside the denoiser, by the rows of a tick.

    python -m benchmarks.tick_costs                         # CPU, embedded model
    python -m benchmarks.tick_costs --architecture sd15     # GPU, SD 1.5's sizes

Prints a Markdown table: milliseconds of a tick in the denoiser and outside it, while as many images
run as fill the rows. Decoding is not counted, and neither are ticks in which images come and go.
"""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING

import torch

from benchmarks.architectures import ARCHITECTURES, build
from benchmarks.peers import Weft
from benchmarks.traffic import SAMPLERS, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = (1, 8, 32, 64)
BRANCHES = {"none": 1, "cfg": 2, "apg": 2}


def main() -> None:
    """Run the images and print the report."""
    options = _options()
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype)
    weft = Weft(architecture, max(options.rows), filled=True)
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    print(
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; {options.steps} steps of {', '.join(SAMPLERS)}\n"
    )
    print(
        "| guidance | rows | denoiser, ms a tick | outside it, ms | share |\n|---|---|---|---|---|"
    )
    for guidance, branches in BRANCHES.items():
        for rows in options.rows:
            if rows >= branches:
                images = rows // branches
                weft.run(_requests(images, guidance, 2))
                _report(guidance, rows, weft, _requests(images, guidance, options.steps))
    weft.stop()


def _requests(count: int, guidance: str, steps: int) -> list[Request]:
    return [
        Request(0.0, "a red circle", SAMPLERS[i % len(SAMPLERS)], guidance, steps, i)
        for i in range(count)
    ]


def _report(guidance: str, rows: int, weft: Weft, requests: Sequence[Request]) -> None:
    outcome = weft.run(list(requests))
    full = outcome.batches.count(rows)
    if full < 0.5 * len(outcome.batches):
        raise RuntimeError(f"only {full} of {len(outcome.batches)} ticks had {rows} rows")
    inside, outside = (
        1000 * outcome.seconds[part] / len(outcome.batches) for part in ("denoiser", "rest")
    )
    share = outside / (inside + outside)
    print(f"| {guidance} | {rows} | {inside:.1f} | {outside:.2f} | {share:.1%} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tick_costs")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
