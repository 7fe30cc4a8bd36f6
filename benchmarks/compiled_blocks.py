"""What compiled blocks and CUDA graphs save of a forward pass, alone and together.

    python -m benchmarks.compiled_blocks                          # CPU, embedded model
    python -m benchmarks.compiled_blocks --architecture sd15      # GPU, SD 1.5's sizes

Prints a Markdown table: milliseconds of a plain forward pass by its rows, the median of rounds in
which both forms take turns, and on a GPU the same replayed from graphs. Programs that the folder
has already are not compiled again.
"""

from __future__ import annotations

import argparse
import logging
import platform
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import torch

from benchmarks.architectures import ARCHITECTURES, build
from server.engine.capture import CudaRecorder
from server.engine.cost_model import TickCost
from server.engine.graphs import Graphs
from server.engine.rehearsal import Rehearsal
from server.models.compiling.compiled_blocks import OFTEN
from server.models.compiling.compiler import BlockCompiler
from server.models.compiling.model_blocks import compile_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from server.engine.rehearsal import Evaluate
    from server.models.compiling.compiled_blocks import CompiledBlocks
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

ROWS = (1, 4, 16)
ROWS_TO_COMPILE = 2
"""A forward of one row does not tell which sizes are those of rows."""


def main() -> None:
    """Compile, time both forms and print the report."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype)
    model, side = architecture.hosted, architecture.side
    rehearsal = Rehearsal(model, side, side)
    with TemporaryDirectory() as temporary, torch.inference_mode():
        folder = options.folder or Path(temporary)
        compile_blocks(model, BlockCompiler(folder, options.processes))
        blocks = model.blocks
        if blocks is None:
            raise RuntimeError(f"nothing is compiled: {model.runs_eager}")
        began = perf_counter()
        _compile(blocks, lambda: rehearsal.seconds(ROWS_TO_COMPILE, model.evaluate), options.wait)
        compiled_s = perf_counter() - began
        columns = {"eager": _plain(model, None), "compiled": _plain(model, blocks)}
        if model.device.type == "cuda":
            columns["eager, graph"] = _replayed(model, None, rehearsal, options.rows)
            columns["compiled, graph"] = _replayed(model, blocks, rehearsal, options.rows)
        _report(options, blocks, compiled_s)
        print(f"| rows | {' | '.join(f'{name}, ms' for name in columns)} |")
        print(f"|---{'|---' * len(columns)}|")
        for rows in options.rows:
            times: dict[str, list[float]] = {name: [] for name in columns}
            for _ in range(options.rounds):
                for name, evaluate in columns.items():
                    times[name].append(rehearsal.seconds(rows, evaluate))
            shown = " | ".join(f"{1000 * median(own):.1f}" for own in times.values())
            print(f"| {rows} | {shown} |", flush=True)


def _compile(blocks: CompiledBlocks, forward: Callable[[], object], most_s: float) -> None:
    """Run forwards until blocks are asked for, and wait until all of them are there."""
    ends = perf_counter() + most_s
    for _ in range(OFTEN):
        forward()
    while blocks.compilation.waiting:
        if perf_counter() > ends:
            raise TimeoutError(f"{blocks.compilation.waiting} shapes are still being compiled")
        sleep(0.1)


def _plain(model: HostedModel, blocks: CompiledBlocks | None) -> Evaluate:
    def evaluate(x: torch.Tensor, t: torch.Tensor, inputs: RowInputs) -> torch.Tensor:
        model.blocks = blocks
        return model.evaluate(x, t, inputs)

    return evaluate


def _replayed(
    model: HostedModel,
    blocks: CompiledBlocks | None,
    rehearsal: Rehearsal,
    rows: Sequence[int],
) -> Evaluate:
    """Forwards that are recorded where that is faster."""
    model.blocks = blocks
    graphs, cost = Graphs(model, CudaRecorder(model.device)), TickCost({1: 1.0})
    for count in rows:
        rehearsal.seconds(count, lambda x, t, inputs: graphs.evaluate(x, t, inputs, cost))
    while graphs.wanted:
        graphs.record()

    def evaluate(x: torch.Tensor, t: torch.Tensor, inputs: RowInputs) -> torch.Tensor:
        model.blocks = blocks
        return graphs.evaluate(x, t, inputs, cost)

    return evaluate


def _report(options: argparse.Namespace, blocks: CompiledBlocks, compiled_s: float) -> None:
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    made = blocks.compilation
    print(
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; {made.compiled} shapes of blocks compiled, {made.eager} as ever, in "
        f"{compiled_s:.0f} s; medians of {options.rounds} rounds\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_blocks")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="for programs; a temporary one by default")
    parser.add_argument("--processes", type=int, help="that compile at once, at most")
    parser.add_argument("--wait", type=float, default=1800.0, help="seconds for all programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
