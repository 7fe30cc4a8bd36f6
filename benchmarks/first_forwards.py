"""Measure how much longer the first call of each size takes on a model that has been warmed up.

    python -m benchmarks.first_forwards --architecture sd15

Prints a Markdown table. Before a server is ready, it runs forward passes at some numbers of rows,
and at others while it is idle; the rows of a tick are padded to such a number. A forward pass at
any other number is the first of its size, for which a GPU's libraries choose or load kernels. The
last column shows calls that were recorded as CUDA graphs, which a server does while it is idle.
"""

from __future__ import annotations

import argparse
import platform
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from benchmarks.architectures import ARCHITECTURES, build
from server.engine.autoencoder_calls import AutoencoderCalls
from server.engine.capture import CudaRecorder
from server.engine.cost_model import MAX_ROWS, TickCost
from server.engine.forwards import Forwards
from server.engine.graphs import Graphs
from server.engine.preparation import AT_START
from server.engine.warmup import time_forwards
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benchmarks.architectures import Architecture
    from server.models.hosted import HostedModel

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
PICTURES = (1, 2, 3, 4)


def main() -> None:
    """Call everything twice and print the report."""
    options = _options()
    torch.set_num_threads(options.threads)
    architecture = build(options.architecture, options.device, options.dtype)
    began = perf_counter()
    with torch.inference_mode():
        model = architecture.hosted
        cost = TickCost(time_forwards(model, MAX_ROWS))
        shape = model.latent_shape(architecture.side, architecture.side)
        on_gpu = model.device.type == "cuda"
        graphs = Graphs(model, CudaRecorder(model.device)) if on_gpu else None
        autoencoder = AutoencoderCalls(model, _recorder_of if on_gpu else None)
        forwards = Forwards(model, shape, cost, MAX_ROWS, graphs)
        for call in autoencoder.first_calls():
            call()
        while forwards.wants(AT_START):
            forwards.prepare()
        warmed_s = perf_counter() - began
        calls = _calls(architecture, forwards, autoencoder)
        graphs_of = dict(zip(calls, (graphs, *autoencoder.graphs), strict=False))
        machine = platform.processor() or platform.machine()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
        print(
            f"{options.architecture}, {options.dtype}, {device}, {options.threads} threads, torch "
            f"{torch.__version__}; warmed up in {warmed_s:.1f} s\n\n"
            "| network | rows | first, ms | second, ms | recorded, ms |\n|---|---|---|---|---|"
        )
        for name, (call, sizes) in calls.items():
            plain = {rows: (_seconds(call, rows), _seconds(call, rows)) for rows in sizes}
            own = graphs_of.get(name)
            while own is not None and own.wanted:
                own.record()
            for rows, (first, second) in plain.items():
                size = forwards.size_of(rows, MAX_ROWS) if name == "denoiser" else rows
                recorded = "-"
                if own is not None and size in own.rows:
                    recorded = f"{1000 * min(_seconds(call, rows) for _ in range(3)):.1f}"
                times = f"{1000 * first:.1f} | {1000 * second:.1f}"
                print(f"| {name} | {rows} | {times} | {recorded} |", flush=True)


def _calls(
    architecture: Architecture, forwards: Forwards, autoencoder: AutoencoderCalls
) -> dict[str, tuple[Callable[[int], Tensor], tuple[int, ...]]]:
    model, side = architecture.hosted, architecture.side
    shape = model.latent_shape(side, side)
    [conditioning] = model.encode_prompts([None], side, side)
    middle = 0.5 if model.facts.prediction == "flow" else 500.0

    def denoise(rows: int) -> Tensor:
        x = torch.randn(rows, *shape, device=model.device)
        t = torch.full((rows,), middle, device=model.device)
        return forwards.evaluate(x, t, RowInputs(model.stack([conditioning] * rows)), MAX_ROWS)

    def decode(rows: int) -> Tensor:
        return autoencoder.decode(torch.zeros(rows, *shape, device=model.device))

    def encode(rows: int) -> Tensor:
        return autoencoder.encode(torch.zeros(rows, 3, side, side, device=model.device))

    return {
        "denoiser": (denoise, ROWS),
        "encoder": (encode, PICTURES),
        "decoder": (decode, PICTURES),
    }


def _recorder_of(model: HostedModel) -> CudaRecorder:
    return CudaRecorder(model.device)


def _seconds(call: Callable[[int], Tensor], rows: int) -> float:
    began = perf_counter()
    # Reading one number synchronizes with the device.
    call(rows).flatten()[0].item()
    return perf_counter() - began


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_forwards")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
