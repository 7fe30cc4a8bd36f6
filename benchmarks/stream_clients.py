"""Weft's live streams, driven in two ways: by engine tasks and by sessions."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from io import BytesIO
from itertools import count, islice
from statistics import median
from threading import Event
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from benchmarks.clip import clip
from benchmarks.peers import wait_for_stream
from benchmarks.stream_runs import CAMERA_FPS, SETTLING_S, RunResult
from server.engine.task import Stream
from server.models.inputs import RowInputs
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.service.hosting import host
from server.service.pixels import pixels_tensor
from server.service.service import Service
from server.service.stream_frame import FailedFrame
from server.service.streams import Streams
from server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.engine import Engine
    from server.engine.state.sequence import ImageResult
    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel
    from server.service.stream import StreamSession

FRAMES_KEPT = 60
"""Number of different frames of a stream, which are repeated."""

TIMINGS = 3
"""Number of timings of a network by itself, whose median is used."""

BACKGROUND = {"prompt": "a blue square", "steps": 20, "sampler": "dpm_solver_pp", "guidance": "cfg"}
"""An ordinary request."""

BACKGROUND_AT_ONCE = 8


class StreamingWeft:
    """A server without HTTP: engine, service and sessions.

    Args:
        folder: model folder.
        row_budget: most rows of a forward; by default the server's.
    """

    def __init__(self, folder: Path, row_budget: int | None = None) -> None:
        models = (f"model={folder}",)
        settings = Settings(models=models, max_pending=4096, row_budget=row_budget)
        hosted = host(settings)
        self.engine: Engine = hosted.engine
        self.model: HostedModel = hosted.models["model"]
        self.service = Service(settings.limits)
        self.service.open(hosted.engine, hosted.models)
        self.sessions = Streams(self.service, settings)
        while not self.engine.ready:
            if self.engine.failure is not None:
                raise self.engine.failure
            sleep(0.05)
        self.side = self.model.facts.default_width

    def stop(self) -> None:
        """End the engine's thread and the service's processes."""
        self.engine.stop(0)
        self.service.close()

    def frames(self, stream: int, *, pauses: bool = False) -> list[NDArray[np.uint8]]:
        """The frames of a stream."""
        return list(islice(clip(self.side, seed=stream, pauses=pauses), FRAMES_KEPT))

    def network_calls(self, rows: int) -> dict[str, Callable[[], Tensor]]:
        """Calls of the networks of a tick, each launched separately.

        Args:
            rows: rows of the denoiser; one picture is encoded and one decoded.
        """
        model, size, device = self.model, (self.side, self.side), self.model.device
        shape = model.latent_shape(*size)
        [conditioning] = model.encode_prompts([None], *size)
        inputs = RowInputs(model.stack([conditioning] * rows))
        x = torch.randn(rows, *shape, device=device)
        t = torch.full((rows,), 500.0, device=device)
        picture = torch.zeros(1, 3, *size, device=device)
        latent = torch.zeros(1, *shape, device=device)
        return {
            "encoder": lambda: model.encode_image(picture),
            "denoiser": lambda: model.evaluate(x, t, inputs),
            "decoder": lambda: model.decode(latent),
        }

    def run(
        self, streams: Sequence[Mapping[str, Any]], seconds: float, *, background: bool = False
    ) -> RunResult:
        """Run streams that always have as many frames in progress as there are stages.

        On a GPU, which decodes beside the ticks, they have one more, which is decoded.

        Args:
            streams: settings of each stream, as a client sends them.
            seconds: measured time.
            background: whether ordinary requests run at the same time.
        """
        live = [self._tasks(settings, number) for number, settings in enumerate(streams)]
        beside = self.model.device.type == "cuda"
        lives = [_Client(self.engine, tasks, tasks[0].plan.evaluations + beside) for tasks in live]
        others = [_Client(self.engine, self._ordinary(), BACKGROUND_AT_ONCE)] * background
        for client in (*others, *lives):
            client.start()
        sleep(SETTLING_S)
        for client in (*lives, *others):
            client.taken()
        began, before = perf_counter(), self._ticks()
        sleep(seconds)
        elapsed, ticks = perf_counter() - began, self._ticks() - before
        taken = [client.taken() for client in lives]
        ordinary = sum(len(client.taken()) for client in others)
        for client in (*lives, *others):
            client.stop()
        frames = sum(map(len, taken))
        return RunResult(
            seconds=elapsed,
            latencies=[[latency for latency, _ in one] for one in taken],
            device_s=self._networks_s(ticks, encoded=frames, decoded=frames + ordinary),
            ordinary=ordinary,
            rows=[sum(rows for _, rows in one) for one in taken],
        )

    def run_sessions(
        self,
        streams: Sequence[Mapping[str, Any]],
        seconds: float,
        *,
        fps: float = CAMERA_FPS,
        pauses: bool = False,
    ) -> tuple[RunResult, float]:
        """Run streams of JPEG files at a camera's frame rate, through the service's sessions.

        Args:
            streams: settings of each stream, as a client sends them.
            seconds: measured time.
            fps: frame rate of the camera.
            pauses: see :func:`benchmarks.clip.clip`.

        Returns:
            The result, and the seconds in which the engine worked.
        """
        ran = asyncio.run(self._run_sessions(streams, seconds, fps, pauses=pauses))
        while self.engine.measurements.pending:
            sleep(0.01)
        return ran

    async def _run_sessions(
        self, streams: Sequence[Mapping[str, Any]], seconds: float, fps: float, *, pauses: bool
    ) -> tuple[RunResult, float]:
        opened = [self.sessions.open() for _ in streams]
        latencies: list[list[float]] = [[] for _ in streams]
        tasks: list[asyncio.Task[None]] = []
        for number, (session, settings) in enumerate(zip(opened, streams, strict=True)):
            await session.change({"max_fps": 1000.0, **settings})
            files = [jpeg(frame) for frame in self.frames(number, pauses=pauses)]
            tasks.append(asyncio.create_task(_film(session, files, fps)))
            tasks.append(asyncio.create_task(_watch(session, latencies[number])))
        await asyncio.sleep(SETTLING_S)
        for one in latencies:
            one.clear()
        began, worked = perf_counter(), self._worked_s()
        await asyncio.sleep(seconds)
        elapsed, worked = perf_counter() - began, self._worked_s() - worked
        kept = [list(one) for one in latencies]
        for task in tasks:
            task.cancel()
        for session in opened:
            self.sessions.close(session)
        return RunResult(seconds=elapsed, latencies=kept), worked

    def _tasks(self, settings: Mapping[str, Any], number: int) -> list[ImageTask]:
        request = GenerateRequest.model_validate(settings)
        prepared, _ = self.service.planner.prepare(request, self.model, (self.side, self.side))
        stream = Stream()
        return [
            task
            for frame in self.frames(number)
            for task in tasks_of(
                prepared,
                self.model,
                image=pixels_tensor(frame),
                stream=stream,
            )
        ]

    def _ordinary(self) -> list[ImageTask]:
        request = GenerateRequest.model_validate(BACKGROUND)
        prepared, _ = self.service.planner.prepare(request, self.model, None)
        return tasks_of(prepared, self.model)

    def _worked_s(self) -> float:
        m = self.engine.measurements
        return m.denoise_s + m.weave_s + m.encode_s + m.decode_s

    def _ticks(self) -> Counter[int]:
        return self.engine.measurements.rows_per_tick.copy()

    def _networks_s(self, ticks: Counter[int], *, encoded: int, decoded: int) -> float:
        """Seconds that the networks alone need for these ticks, measured now."""
        with torch.inference_mode():
            usual = sorted(n for n, count in ticks.items() if count >= 0.05 * ticks.total())
            seconds = [_timed(self.network_calls(n)["denoiser"]) for n in usual]
            calls = self.network_calls(1)
            encoder, decoder = (_timed(calls[name]) for name in ("encoder", "decoder"))
        denoiser = sum(
            count * float(np.interp(rows, usual, seconds)) for rows, count in ticks.items()
        )
        return denoiser + encoded * encoder + decoded * decoder


class _Client:
    """Submits another frame whenever one comes back."""

    def __init__(self, engine: Engine, tasks: Sequence[ImageTask], window: int) -> None:
        self._engine = engine
        self._tasks = tasks
        self._window = window
        self._submitted = 0
        self._began: deque[float] = deque()
        self._ended: list[tuple[float, int]] = []
        self._failure: Exception | None = None
        self._stopping = False
        self._idle = Event()

    def start(self) -> None:
        self._submit()

    def taken(self) -> list[tuple[float, int]]:
        """Latency and rows of the frames since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        """Wait until no frame is in progress."""
        self._stopping = True
        self._idle.wait()
        if self._failure is not None:
            raise self._failure

    def _submit(self) -> None:
        task = self._tasks[self._submitted % len(self._tasks)]
        self._submitted += 1
        self._began.append(perf_counter())
        self._engine.submit([task], self)

    def started(self, index: int) -> None:
        del index
        # Submitted one after another, so that frames are at different stages.
        if self._submitted < self._window:
            self._submit()

    def progress(self, index: int, step: int, steps: int, preview: object) -> None: ...

    def finished(self, index: int, result: ImageResult) -> None:
        del index
        self._ended.append((perf_counter() - self._began.popleft(), result.evaluations))
        if not self._stopping:
            self._submit()
        elif not self._began:
            self._idle.set()

    def failed(self, index: int, error: Exception) -> None:
        del index
        self._failure = error
        self._idle.set()


async def _film(session: StreamSession, files: Sequence[bytes], fps: float) -> None:
    """Offer frames at a camera's frame rate, regardless of the output."""
    for number in count():
        session.offer(files[number % len(files)])
        await asyncio.sleep(1 / fps)


async def _watch(session: StreamSession, latencies: list[float]) -> None:
    while True:
        output = await session.next()
        if isinstance(output, FailedFrame):
            raise output.error
        latencies.append(output.total_s)


def jpeg(frame: NDArray[np.uint8]) -> bytes:
    """Encode a frame as a JPEG file."""
    file = BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=90)
    return file.getvalue()


def _timed(call: Callable[[], object]) -> float:
    """Median seconds of a call, including the work that it launches on the device."""
    seconds: list[float] = []
    for _ in range(TIMINGS):
        began = perf_counter()
        call()
        wait_for_stream()
        seconds.append(perf_counter() - began)
    return median(seconds)
