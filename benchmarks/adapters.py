"""Measure what adapters cost a forward pass of the denoiser.

    python -m benchmarks.adapters
    python -m benchmarks.adapters --architecture sd15 --device cuda

Forward passes with and without adapters take turns. Each time is a median, and each ratio is the
median of the ratios to the pass without adapters in the same turn. Prints one table for rows with
the given number of different adapters: on attention only, as in most LoRA files; on all linear
layers; and on all layers including convolutions. For comparison it also has one pass for each
adapter, as needed by a server that merges adapters into the weights.

On a GPU, a second table shows passes of few rows with adapters on all linear layers: launched from
Python, and replayed by the engine from CUDA graphs.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.architectures import ARCHITECTURES, build
from server.engine.capture import CudaRecorder
from server.engine.cost_model import TickCost
from server.engine.graphs import IDLE_THRESHOLD, Graphs
from server.models.adapters.adapter import Adapter, LowRank, RowAdapters, Weighted

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

KINDS = {
    "attention": (".attn", nn.Linear),
    "linear layers": ("", nn.Linear),
    "all layers": ("", nn.Module),
}
"""Layers that an adapter changes: a substring of their names, and their class."""

RECORDED_ROWS = (1, 2, 4, 8)
RECORDED_KIND = "linear layers"

TOLD = 500.0
"""Timestep of all rows; its value does not affect the cost."""


@dataclass(frozen=True, slots=True)
class Forward:
    """The inputs of one forward pass of a benchmark, and the function that runs it."""

    evaluate: Callable[[torch.Tensor, torch.Tensor, RowInputs], torch.Tensor]
    x: torch.Tensor
    inputs: RowInputs
    clock: Callable[[], float]

    def seconds(self) -> float:
        """The duration of one pass."""
        t = torch.full((len(self.x),), TOLD, device=self.x.device)
        began = self.clock()
        # Reading one number synchronizes with the device.
        self.evaluate(self.x, t, self.inputs).flatten()[0].item()
        return self.clock() - began

    def with_adapters(self, rows: RowAdapters) -> Forward:
        """The same pass with adapters."""
        return replace(self, inputs=replace(self.inputs, adapters=rows))

    def of(self, rows: list[int]) -> Forward:
        """The same pass for some of the rows."""
        return replace(self, x=self.x[rows], inputs=self.inputs.of(rows))


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build(options.architecture, options.device, options.dtype).hosted
    size = options.size or model.facts.default_width
    shape = model.latent_shape(size, size)
    x = torch.randn(options.rows, *shape, device=model.device)
    clock = process_time if options.processor_time else perf_counter
    plain = Forward(model.evaluate, x, model.inputs(["a red circle"] * options.rows), clock)
    print(_heading(options))
    rows = f"{options.rows} rows of {size} x {size} pixels"
    print(f"{rows}, {options.adapters} adapters of rank {options.rank}\n")
    print("| adapters on | ms without | ms with | with / without | merged, one pass for each |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        adapters = [_adapter(model, kind, options.rank) for _ in range(options.adapters)]
        places = [[*range(k, options.rows, options.adapters)] for k in range(options.adapters)]
        adapted = plain.with_adapters(_spread(adapters, options.rows))
        merged = [plain.of(rows) for rows in places if rows]
        turns = {
            "without": plain.seconds,
            "with": adapted.seconds,
            "merged": lambda passes=merged: sum(one.seconds() for one in passes),
        }
        measured = _taking_turns(turns, options.rounds)
        ratios = {
            name: median(a / b for a, b in zip(measured[name], measured["without"], strict=True))
            for name in turns
        }
        without, with_adapters = (1000 * median(measured[name]) for name in ("without", "with"))
        print(
            f"| {kind} | {without:.1f} | {with_adapters:.1f} | {ratios['with']:.2f} x "
            f"| {ratios['merged']:.2f} x |",
            flush=True,
        )
    if model.device.type == "cuda":
        _print_recorded(model, plain, options)


def _print_recorded(model: HostedModel, plain: Forward, options: argparse.Namespace) -> None:
    """Print the times of passes of few rows with and without CUDA graphs."""
    columns = "ms without, launched", "replayed", "ms with adapters, launched", "replayed"
    print(f"\n| rows | {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    graphs = Graphs(model, CudaRecorder(model.device))
    replaying = partial(graphs.evaluate, cost=TickCost({1: 1.0}))
    adapters = [_adapter(model, RECORDED_KIND, options.rank) for _ in range(options.adapters)]
    for rows in RECORDED_ROWS:
        launched = plain.of([row % options.rows for row in range(rows)])
        passes = [launched, launched.with_adapters(_spread(adapters, rows))]
        replayed = [replace(one, evaluate=replaying) for one in passes]
        for one in replayed:
            for _ in range(IDLE_THRESHOLD):
                one.seconds()
        while graphs.wanted:
            graphs.record()
        ways = [way for pair in zip(passes, replayed, strict=True) for way in pair]
        turns = {str(number): way.seconds for number, way in enumerate(ways)}
        figures = (median(own) for own in _taking_turns(turns, options.rounds).values())
        listed = " | ".join(f"{1000 * seconds:.1f}" for seconds in figures)
        print(f"| {rows} | {listed} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", type=int, help="pixels of a side; by default the model's own")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count this process's own time, on a CPU that is busy with others; with --threads 1",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _adapter(model: HostedModel, kind: str, rank: int) -> Adapter:
    """An adapter with random weights, too small to affect the result."""
    within, of = KINDS[kind]
    changes: dict[str, LowRank] = {}
    for name, layer in model.adaptable()["unet"].named_modules():
        if within in name and isinstance(layer, of) and isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight
            down = torch.randn(rank, *weight.shape[1:]).to(weight) / 100
            if down.ndim == 4:
                down = down.contiguous(memory_format=torch.channels_last)
            changes[name] = LowRank(down, torch.randn(len(weight), rank).to(weight) / 100)
    return Adapter("benchmark", "", {"unet": changes})


def _spread(adapters: list[Adapter], rows: int) -> RowAdapters:
    """The adapters, assigned to the rows in turn."""
    return RowAdapters(
        tuple((Weighted(adapters[row % len(adapters)], 0.8),) for row in range(rows))
    )


def _taking_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    for run in turns.values():
        run()
    measured: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, run in turns.items():
            measured[name].append(run())
    return measured


def _heading(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return (
        f"{options.architecture}, {options.dtype}, {device or platform.machine()}, "
        f"{options.threads} threads, torch {torch.__version__}; {options.rounds} rounds"
    )


if __name__ == "__main__":
    main()
