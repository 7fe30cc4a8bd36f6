"""The compared systems: Weft's engine, and diffusers' pipeline used in two ways."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf
from threading import Event
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from guidance import RULES
from guidance.always import Always
from samplers import SAMPLERS
from samplers.timesteps import Trailing
from server.engine.engine import Engine
from server.engine.selection import Selection
from server.engine.task import ImageTask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.allowance import Allowance
    from benchmarks.architectures import Architecture
    from benchmarks.traffic import Request
    from server.engine.scheduler import Load
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import ImageResult
    from server.models.hosted import HostedModel

POLL_S = 0.05

SETTLING_SHARE = 0.3
"""Fraction of the remaining time that settling may take."""

SCALES = {"none": 1.0, "cfg": 4.0, "apg": 7.5}


@dataclass(slots=True)
class Outcome:
    """The result of one system for one run of requests.

    Attributes:
        latencies: seconds from arrival to picture.
        total_s: seconds from the start to the last picture.
        seconds: seconds by kind of work: ``denoiser``, ``decoder`` and ``rest``.
        batches: images in each static batch, or rows in each tick.
        share: fraction of the requested evaluations that was done in the time.
    """

    latencies: list[float]
    total_s: float
    seconds: dict[str, float]
    batches: list[int] = field(default_factory=list)
    share: float = 1.0


class _FilledTicks(Selection):
    @override
    def rows_of_tick(self, load: Load, lane: Lane) -> int:
        return self._measurements.row_budget


class Filled(Engine):
    """An engine in which every tick is as full as its budget allows."""

    selecting = _FilledTicks


class Weft:
    """Weft's engine without HTTP, as the pipelines have none.

    Args:
        architecture: the model.
        row_budget: maximum number of rows of a tick; None lets the engine choose.
        kind: class of the engine; :class:`Filled` fills every tick up to the budget, instead of
            choosing its rows by their cost.
        deterministic: give images whose bits do not depend on what else is in the batch.

    Attributes:
        engine: the running engine.
        model: the model that it serves.
    """

    def __init__(
        self,
        architecture: Architecture,
        row_budget: int | None,
        *,
        kind: type[Engine] = Engine,
        deterministic: bool = False,
    ) -> None:
        self._architecture = architecture
        self.model = architecture.hosted
        self.engine = kind(
            {"model": architecture.hosted},
            row_budget=row_budget,
            deterministic=deterministic,
            max_pending=4096,
        )
        self.engine.start()
        while not self.engine.ready:
            if self.engine.failure is not None:
                raise self.engine.failure
            sleep(POLL_S)

    @property
    def row_budget(self) -> int:
        """Maximum number of rows of a tick."""
        return self.engine.measurements.row_budget

    @property
    def forwards(self) -> int:
        """Ticks since the start."""
        return self.engine.measurements.ticks

    def run(self, requests: list[Request]) -> Outcome:
        """Run all requests, each submitted at its time of arrival."""
        tasks = [self._task(request) for request in requests]
        watched = self._watch()
        began = perf_counter()
        arrivals = [began + request.arrival_s for request in requests]
        listeners = [_Arrival(arrival) for arrival in arrivals]
        for task, listener in zip(tasks, listeners, strict=True):
            sleep(max(0.0, listener.arrived_at - perf_counter()))
            self.engine.submit([task], listener)
        for listener in listeners:
            listener.ended.wait()
        return watched([listener.latency() for listener in listeners])

    def follow(self, clients: Sequence[Sequence[Request]]) -> Outcome:
        """Run clients that each request the next image once they have the previous one.

        Args:
            clients: requests of each client.
        """
        tasks = [[self._task(request) for request in client] for client in clients]
        watched = self._watch()
        followers = [_Follower(self.engine, own) for own in tasks]
        for follower in followers:
            follower.ask()
        return watched([one for follower in followers for one in follower.latencies()])

    def undisturbed(self) -> AbstractContextManager[None]:
        """Let the engine do nothing but ticks inside the ``with`` block.

        Code timed in the block does not share the device with graph recording, and may synchronize
        with the whole device.
        """
        return self.engine.undisturbed()

    def stop(self) -> None:
        """End the engine's thread."""
        self.engine.stop(0)

    def _task(self, request: Request) -> ImageTask:
        sampler = _named(SAMPLERS, request.sampler)()
        rule = _named(RULES, request.guidance)
        width, height = request.size or (self._architecture.side, self._architecture.side)
        schedule = self._architecture.hosted.schedule(width, height, request.steps)
        grid = schedule.grid(Trailing(), request.steps)
        return ImageTask(
            model="model",
            prompt=request.prompt,
            negative_prompt="",
            width=width,
            height=height,
            seed=request.seed,
            plan=sampler.plan(grid),
            rule=rule() if request.guidance == "none" else rule(scale=SCALES[request.guidance]),
            policy=Always(),
        )

    def _watch(self) -> Callable[[list[float]], Outcome]:
        """Start measuring a run; the returned function creates its outcome from the latencies."""
        measured = self.engine.measurements
        began, spent, sizes = perf_counter(), self._spent(), measured.rows_per_tick.copy()

        def outcome(latencies: list[float]) -> Outcome:
            total_s, after = perf_counter() - began, self._spent()
            ticks = (measured.rows_per_tick - sizes).items()
            return Outcome(
                latencies,
                total_s,
                {name: after[name] - spent[name] for name in after},
                [rows for rows, count in ticks for _ in range(count)],
            )

        return outcome

    def _spent(self) -> dict[str, float]:
        m = self.engine.measurements
        return {"denoiser": m.denoise_s, "decoder": m.decode_s, "rest": m.weave_s + m.encode_s}


class _Arrival:
    def __init__(self, arrived_at: float) -> None:
        self.arrived_at = arrived_at
        self.ended = Event()
        self.failure: Exception | None = None
        self._ended_at = 0.0

    def latency(self) -> float:
        if self.failure is not None:
            raise self.failure
        return self._ended_at - self.arrived_at

    def started(self, index: int) -> None:
        del index

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        del index, step, steps, preview

    def finished(self, index: int, result: ImageResult) -> None:
        del index, result
        self._ended_at = perf_counter()
        self.ended.set()

    def failed(self, index: int, error: Exception) -> None:
        del index
        self.failure = error
        self.ended.set()


class _Follower:
    """One client, whose callbacks run in the engine's thread."""

    def __init__(self, engine: Engine, tasks: Sequence[ImageTask]) -> None:
        self._engine = engine
        self._tasks = deque(tasks)
        self._asked_at = 0.0
        self._latencies: list[float] = []
        self._failure: Exception | None = None
        self._ended = Event()

    def ask(self) -> None:
        """Request the next image; if there is none, the client is done."""
        if not self._tasks:
            self._ended.set()
            return
        self._asked_at = perf_counter()
        self._engine.submit([self._tasks.popleft()], self)

    def latencies(self) -> list[float]:
        """Wait until the client is done, and return the latencies of its images."""
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self._latencies

    def started(self, index: int) -> None: ...

    def progress(self, index: int, step: int, steps: int, preview: object) -> None: ...

    def finished(self, index: int, result: ImageResult) -> None:
        del index, result
        self._latencies.append(perf_counter() - self._asked_at)
        self.ask()

    def failed(self, index: int, error: Exception) -> None:
        del index
        self._failure = error
        self._ended.set()


class Diffusers:
    """diffusers' own pipeline and schedulers.

    Args:
        architecture: the model.
        largest: maximum number of images in a batch. With 1, requests run one after another.
            Otherwise, whenever it is free, it takes the oldest waiting request and all waiting
            requests with the same sampler, guidance and steps, up to this number.

    The pipeline has no APG; such requests run there with plain guidance, which takes the same
    number of evaluations and slightly less arithmetic.
    """

    def __init__(self, architecture: Architecture, *, largest: int) -> None:
        self._pipeline = architecture.pipeline
        self._denoiser = architecture.denoiser
        self._side = architecture.side
        self._largest = largest
        self._busy_s = 0.0
        self._schedulers = _schedulers(self._pipeline.scheduler.config)

    def run(self, requests: list[Request], until: float = inf) -> Outcome:
        """Run all requests, none before its time of arrival.

        Args:
            requests: requests in order of arrival.
            until: time by ``perf_counter`` after which no further batch is started; at least one
                batch always runs.
        """
        self._busy_s = 0.0
        unet, vae = Clock(self._denoiser), Clock(self._pipeline.vae.decoder)
        latencies: list[float] = []
        batches: list[int] = []
        waiting = list(range(len(requests)))
        began = perf_counter()
        try:
            while waiting and (perf_counter() < until or not batches):
                sleep(max(0.0, began + requests[waiting[0]].arrival_s - perf_counter()))
                batch = self._next(requests, waiting, perf_counter() - began)
                waiting = [i for i in waiting if i not in batch]
                self._generate([requests[i] for i in batch])
                batches.append(len(batch))
                latencies += [perf_counter() - began - requests[i].arrival_s for i in batch]
            total = perf_counter() - began
        finally:
            inside, decoding = unet.stop(), vae.stop()
        busy = {"denoiser": inside, "decoder": decoding, "rest": self._busy_s - inside - decoding}
        left = sum(requests[i].evaluations for i in waiting)
        share = 1 - left / sum(request.evaluations for request in requests)
        return Outcome(latencies, total, busy, batches, share)

    def _next(self, requests: list[Request], waiting: list[int], now: float) -> list[int]:
        head = requests[waiting[0]]
        like = [
            i
            for i in waiting
            if requests[i].arrival_s <= now and requests[i].settings == head.settings
        ]
        return like[: self._largest] or waiting[:1]

    def _generate(self, batch: list[Request]) -> None:
        began = perf_counter()
        head = batch[0]
        self._pipeline.scheduler = self._schedulers[head.sampler]()
        self._pipeline(
            [request.prompt for request in batch],
            num_inference_steps=head.steps,
            guidance_scale=SCALES[head.guidance],
            width=self._side,
            height=self._side,
            generator=[torch.Generator().manual_seed(request.seed) for request in batch],
            output_type="np",
        )
        self._busy_s += perf_counter() - began


class Clock:
    """Measures the time inside a module, by hooks that synchronize with their thread's GPU stream.

    They synchronize only with that stream: while a graph is being captured, it is an error to
    synchronize with the device or with a stream that is being captured.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._total = 0.0
        self._began = 0.0
        self._hooks = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave),
        )

    def stop(self) -> float:
        """Stop measuring, and return the total seconds."""
        for hook in self._hooks:
            hook.remove()
        return self._total

    def _enter(self, *_: Any) -> None:
        wait_for_stream()
        self._began = perf_counter()

    def _leave(self, *_: Any) -> None:
        wait_for_stream()
        self._total += perf_counter() - self._began


def settle(engine: Engine, model: HostedModel, max_s: float, allowance: Allowance) -> None:
    """Let an idle engine prepare and record forward passes, and report how far it got.

    Args:
        engine: engine that has already run what will be measured.
        model: model that it serves.
        max_s: maximum seconds to wait, within the remaining time.
        allowance: time limit of the benchmark.
    """
    until = perf_counter() + min(max_s, SETTLING_SHARE * allowance.left_s)
    while not engine.settled and perf_counter() < until:
        sleep(POLL_S)
    state = "settled" if engine.settled else "not settled, as time was short"
    recorded = len(engine.prepared(model).recorded)
    allowance.say(f"{state}: {recorded} forwards are recorded as graphs")


def wait_for_stream() -> None:
    """Synchronize with this thread's GPU stream, unless it is being captured."""
    if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream().synchronize()


def _schedulers(config: Any) -> dict[str, Callable[[], Any]]:
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    kinds = {
        "ddim": DDIMScheduler,
        "dpm_solver_pp": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
        "euler_ancestral": EulerAncestralDiscreteScheduler,
    }
    return {
        name: lambda kind=kind: kind.from_config(config, timestep_spacing="trailing")
        for name, kind in kinds.items()
    }


def _named(registry: tuple[type[Any], ...], name: str) -> type[Any]:
    return {entry.model_fields["name"].default: entry for entry in registry}[name]
