"""Measure what compiled blocks and CUDA graphs save in a forward pass, alone and together.

    python -m benchmarks.compiled_blocks                          # CPU, embedded model
    python -m benchmarks.compiled_blocks --architecture sd15      # GPU, SD 1.5's sizes

Prints Markdown tables of the milliseconds of a plain forward pass by its number of rows, each row
as soon as it is measured: first eager, and on a GPU also replayed from graphs; then, once the
blocks are compiled, all forms again. Each figure is the median of rounds in which the forms take
turns. Programs already in the folder are not compiled again. Blocks that are not compiled within
the seconds of ``--wait``, or of ``--within`` minus the time for the second table, run eagerly, and
the report says how many there are.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Lock
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import torch

from benchmarks.allowance import Allowance, add_within
from benchmarks.architectures import ARCHITECTURES, build
from server.engine.capture import CudaRecorder
from server.engine.cost_model import TickCost
from server.engine.graphs import Graphs
from server.engine.rehearsal import Rehearsal
from server.models.compiling.compiled_blocks import COMPILE_THRESHOLD
from server.models.compiling.compiler import BlockCompiler
from server.models.compiling.model_blocks import compile_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from server.engine.rehearsal import Evaluate
    from server.models.compiling.compiled_blocks import CompiledBlocks, Compiler
    from server.models.compiling.program import BlockJob
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

    Program = Callable[..., Sequence[Tensor]]
    OnDone = Callable[[Program | None, str], None]

ROWS = (1, 4, 16)
ROWS_TO_COMPILE = 2
"""Rows of the forward pass that is compiled: with one row, row axes cannot be told from others."""

LAST_TABLE = 4
"""Time reserved for the second table, as a multiple of that of the first: it has twice as many
forms, which must be recorded."""


def main() -> None:
    """Compile, time all forms and print the report."""
    options = _options()
    allowance = Allowance(options.within)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype, allowance.say)
    model, side = architecture.hosted, architecture.side
    rehearsal = Rehearsal(model, side, side)
    print(_heading(options), flush=True)
    with TemporaryDirectory() as temporary, torch.inference_mode():
        forms = {"eager": _plain(model, None)}
        if model.device.type == "cuda":
            forms["eager, graph"] = _replayed(model, None, rehearsal, options.rows)
            allowance.say("eager forwards recorded")
        taken_s = _report("As they are", forms, rehearsal, options)
        compiler = DeadlineCompiler(
            BlockCompiler(options.folder or Path(temporary), options.processes)
        )
        compile_blocks(model, compiler)
        blocks = model.blocks
        if blocks is None:
            raise RuntimeError(f"nothing is compiled: {model.runs_eager}")
        _compile(
            blocks,
            lambda: rehearsal.seconds(ROWS_TO_COMPILE, model.evaluate),
            min(options.wait, allowance.left_s - LAST_TABLE * taken_s),
            allowance,
        )
        late, made = compiler.stop(), blocks.compilation
        allowance.say(f"{made.compiled} shapes of blocks are compiled")
        print(
            f"\n{made.compiled} shapes of blocks are compiled, {made.eager} run as they are, of "
            f"which {late} for want of time",
            flush=True,
        )
        if not made.compiled:
            return
        forms["compiled"] = _plain(model, blocks)
        if model.device.type == "cuda":
            forms["compiled, graph"] = _replayed(model, blocks, rehearsal, options.rows)
            allowance.say("compiled forwards recorded")
        _report("Compiled blocks", forms, rehearsal, options)


class DeadlineCompiler:
    """A compiler that can be stopped; blocks not compiled by then are never compiled.

    Args:
        compiler: compiler that does the work.
    """

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._lock = Lock()
        self._waiting: dict[object, OnDone] = {}

    def ask(
        self,
        job: BlockJob,
        identity: str,
        on_done: OnDone,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """See ``BlockCompiler.ask``."""
        asked = object()
        self._waiting[asked] = on_done

        def hear(program: Program | None, said: str) -> None:
            with self._lock:
                late = self._waiting.pop(asked, None) is None
            if not late:
                on_done(program, said)

        self._compiler.ask(job, identity, hear, lambda: asked in self._waiting and wanted())

    def stop(self) -> int:
        """Give up pending jobs and end the compiling processes; returns the number of jobs."""
        with self._lock:
            late, self._waiting = self._waiting, {}
        for on_done in late.values():
            on_done(None, "there was no time to compile it")
        for process in active_children() if late else ():
            if process.pid is not None:
                # Together with the compilers that it has started.
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        return len(late)


def _compile(
    blocks: CompiledBlocks, forward: Callable[[], object], max_s: float, allowance: Allowance
) -> None:
    """Run forward passes until compilation is requested, and wait for the programs."""
    ends = perf_counter() + max_s
    for _ in range(COMPILE_THRESHOLD):
        forward()
    before = None
    while (made := blocks.compilation).waiting and perf_counter() < ends:
        if made.waiting != before:
            allowance.say(f"{made.waiting} shapes of blocks wait for others or a compiler")
        before = made.waiting
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
    """Forward passes that are recorded where that is faster."""
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


def _report(
    title: str,
    forms: Mapping[str, Evaluate],
    rehearsal: Rehearsal,
    options: argparse.Namespace,
) -> float:
    """Print the milliseconds of all forms, which take turns; returns the seconds that this took."""
    began = perf_counter()
    print(f"\n### {title}\n\n| rows | {' | '.join(f'{name}, ms' for name in forms)} |")
    print(f"|---{'|---' * len(forms)}|", flush=True)
    for rows in options.rows:
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(options.rounds):
            for name, evaluate in forms.items():
                times[name].append(rehearsal.seconds(rows, evaluate))
        shown = " | ".join(f"{1000 * median(own):.1f}" for own in times.values())
        print(f"| {rows} | {shown} |", flush=True)
    return perf_counter() - began


def _heading(options: argparse.Namespace) -> str:
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    return (
        f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
        f"{torch.__version__}; medians of {options.rounds} rounds"
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
    add_within(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
