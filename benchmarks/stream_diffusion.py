"""StreamDiffusion's own package as a peer, from a folder, as it is not one of our dependencies.

    pip install --no-deps --target FOLDER streamdiffusion==0.1.1

The package times itself with CUDA events, which are replaced by dummies where there is no GPU.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.stream_runs import RunResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

STEPS = 50
"""Number of steps of the schedule from which the stages are picked."""

STAGES = {1: [25], 4: [10, 20, 30, 40]}
"""Indices into that schedule."""

SCALE = 1.5


class _Event:
    """Stands in for a CUDA event."""

    def __init__(self, **options: Any) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        del other
        return 0.0


class StreamDiffusionPeer:
    """One image-to-image stream of the package, set up as in its examples.

    Args:
        package: folder into which the package was installed.
        model: model folder.
        side: width and height of the pictures in pixels.
        stages: number of stages, 1 or 4.
        guidance: ``none``, ``self``, ``initialize`` or ``full``.
        channels_last: whether its networks get the memory format of ours, which the package does
            not do itself.
    """

    def __init__(
        self,
        package: Path,
        model: Path,
        *,
        side: int,
        stages: int,
        guidance: str,
        channels_last: bool,
    ) -> None:
        if str(package) not in sys.path:
            sys.path.insert(0, str(package))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        if device.type == "cpu":
            torch.cuda.Event = _Event  # type: ignore[misc, assignment]
            torch.cuda.synchronize = lambda *_: None
        from diffusers import StableDiffusionPipeline
        from streamdiffusion import (  # pyright: ignore[reportMissingImports]
            StreamDiffusion,  # pyright: ignore[reportUnknownVariableType]
        )

        pipeline: Any = StableDiffusionPipeline.from_pretrained(
            model, safety_checker=None, dtype=dtype
        )
        pipeline.to(device)
        if channels_last:
            for network in (pipeline.unet, pipeline.vae):
                network.to(memory_format=torch.channels_last)
        self._stages = stages
        self._stream: Any = StreamDiffusion(
            pipeline,
            STAGES[stages],
            torch_dtype=dtype,
            width=side,
            height=side,
            cfg_type=guidance,
        )
        self._stream.prepare(
            "a red circle", "", num_inference_steps=STEPS, guidance_scale=SCALE, delta=1.0
        )

    def run(self, frames: Sequence[NDArray[np.uint8]], seconds: float) -> RunResult:
        """Run frames one after another; each output belongs to the input ``stages - 1`` earlier."""
        inputs = [torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames]
        began: list[float] = []
        ended: list[float] = []
        start = perf_counter()
        while perf_counter() - start < seconds:
            began.append(perf_counter())
            picture = self._stream(inputs[len(began) % len(inputs)])
            _ = (
                ((picture[0] / 2 + 0.5).clamp(0, 1) * 255)
                .round()
                .byte()
                .permute(1, 2, 0)
                .cpu()
                .numpy()
            )
            ended.append(perf_counter())
        late = self._stages - 1
        latencies = [b - a for a, b in zip(began, ended[late:], strict=False)]
        return RunResult(seconds=perf_counter() - start, latencies=[latencies])
