"""Where the time of a live stream's frame goes, part by part."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from statistics import median
from threading import local
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import torch
from typing_extensions import ParamSpec

from benchmarks.operation_count import OperationCount
from server.engine.state.lane import Lane
from server.engine.tick import stage, weave
from server.service import stream
from server.service.stream_frame import FrameListener

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from server.engine.engine import Engine

__all__ = ["BESIDE", "NETWORKS", "FrameParts", "Part", "watched", "watched_session"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

EDGE = 5
"""Frames at the start and end that are not counted, as fewer are in progress, or none starts."""

HAND_OVER = "hand-over of the picture"
NETWORKS = ("encoder", "denoiser", "decoder")

BESIDE = ("file to pixels", "submission", "way to the event loop", "picture to file")
"""Parts of a session's frame outside the engine's thread: in other threads and processes."""


@dataclass(frozen=True, slots=True)
class Call:
    """A finished call of a part.

    Attributes:
        ended: time at which it ended, by ``perf_counter``.
        seconds: seconds that it took, without those of parts inside it.
        operations: operations that it launched on the device, without those of parts inside it.
        events: events before and after it on a GPU's stream; None if they were not recorded.
    """

    ended: float
    seconds: float
    operations: int
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None


@dataclass(frozen=True, slots=True)
class Part:
    """The share of a part in a frame.

    Attributes:
        calls: calls per frame.
        median_s: median seconds of a call.
        seconds: seconds per frame, in the thread that makes the calls.
        device_s: median seconds of a call on a GPU's stream, including waits for the work of
            other streams; None if no such time was measured.
    """

    calls: float
    median_s: float
    seconds: float
    device_s: float | None


@dataclass(slots=True)
class _Inner:
    """Seconds and operations of the parts inside a call that has not ended."""

    seconds: float = 0.0
    operations: int = 0


class FrameParts:
    """Records the calls of the parts.

    Args:
        synchronizes: whether to wait for a GPU after each call of a network, so that the host's
            time is that of the network; then nothing runs concurrently.
        counts: whether to count the operations launched on the device, which is slow.
    """

    def __init__(self, *, synchronizes: bool = False, counts: bool = False) -> None:
        self._synchronizes = synchronizes and torch.cuda.is_available()
        self._count = OperationCount() if counts else None
        self._calls: dict[str, list[Call]] = {}
        self._under_way = local()

    def timed(
        self, name: str, call: Callable[Arguments, Result], *, network: bool = False
    ) -> Callable[Arguments, Result]:
        """Wrap a call so that it is recorded as one of a part.

        Args:
            name: name of the part.
            call: the call; calls of one thread may be nested.
            network: whether it runs a network, whose time a GPU can measure.
        """

        @wraps(call)
        def noted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            outer, inner = getattr(self._under_way, "inner", None), _Inner()
            self._under_way.inner = inner
            began, asked = perf_counter(), self._asked
            events = _events() if network else None
            try:
                return call(*args, **kwargs)
            finally:
                if events is not None:
                    events[1].record()
                if network and self._synchronizes:
                    torch.cuda.synchronize()
                ended = perf_counter()
                seconds, operations = ended - began, self._asked - asked
                own = seconds - inner.seconds, operations - inner.operations
                self._note(name, Call(ended, *own, events))
                if outer is not None:
                    outer.seconds += seconds
                    outer.operations += operations
                self._under_way.inner = outer

        return noted

    def awaited(
        self, name: str, call: Callable[Arguments, Awaitable[Result]]
    ) -> Callable[Arguments, Awaitable[Result]]:
        """Wrap a coroutine of an event loop so that its calls are recorded as those of a part."""

        @wraps(call)
        async def noted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            began = perf_counter()
            made = await call(*args, **kwargs)
            self.waited(name, began)
            return made

        return noted

    def waited(self, name: str, since: float) -> None:
        """Record that a part has ended now that began at this time by ``perf_counter``."""
        now = perf_counter()
        self._note(name, Call(now, now - since, 0, None))

    def counted(self, call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Wrap a call so that its operations are counted, if operations are counted at all."""

        @wraps(call)
        def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self._count or nullcontext():
                return call(*args, **kwargs)

        return inside

    @property
    def frames(self) -> int:
        """Number of frames that are counted: those handed over, without the ones at both ends."""
        return max(0, len(self._handed) - 1)

    def parts(self) -> dict[str, Part]:
        """The share of each part in a frame."""
        if not self.frames:
            return {}
        first, last = self._handed[0].ended, self._handed[-1].ended
        parts: dict[str, Part] = {}
        for name, calls in self._calls.items():
            inside = [one for one in calls if first < one.ended <= last]
            if not inside:
                continue
            devices = [
                one.events[0].elapsed_time(one.events[1]) / 1000
                for one in inside
                if one.events is not None
            ]
            parts[name] = Part(
                len(inside) / self.frames,
                median(one.seconds for one in inside),
                sum(one.seconds for one in inside) / self.frames,
                median(devices) if devices else None,
            )
        return parts

    def operations(self) -> dict[str, float]:
        """Mean number of operations that a call of each part launches, if they were counted."""
        return {
            name: sum(one.operations for one in calls) / len(calls)
            for name, calls in self._calls.items()
        }

    @property
    def frame_s(self) -> float:
        """Mean seconds from one frame to the next."""
        if not self.frames:
            return 0.0
        return (self._handed[-1].ended - self._handed[0].ended) / self.frames

    @property
    def _handed(self) -> list[Call]:
        """The hand-overs of the counted frames, and of the frame before them."""
        handed = self._calls.get(HAND_OVER, [])
        edge = min(EDGE, len(handed) // 4)
        return handed[edge : len(handed) - edge]

    def _note(self, name: str, call: Call) -> None:
        self._calls.setdefault(name, []).append(call)

    @property
    def _asked(self) -> int:
        return 0 if self._count is None else self._count.total


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
    if not torch.cuda.is_available():
        return None
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    return began, ended


@contextmanager
def watched(engine: Engine, parts: FrameParts) -> Generator[None]:
    """Record the calls of an engine's parts inside the ``with`` block; one engine at a time.

    Args:
        engine: engine that has no work yet.
        parts: where the calls are recorded.
    """
    own: Any = engine
    places: list[tuple[Any, str, str]] = [
        (own, "_wait_for_work", "waiting for work"),
        (own, "_admit", "taking frames in"),
        (own._selection, "next_tick", "choice of rows"),
        (weave, "pack", "guidance and step"),
        (weave, "evaluate", "guidance and step"),
        (weave, "guide", "guidance and step"),
        (weave, "step", "guidance and step"),
        (weave, "write_back", "guidance and step"),
        (stage, "_read_to_host", "wait for the device"),
        (own, "_report_and_count", "reports"),
        (own, "_hear", "reports"),
        (own._decoder, "_decoding", "pixels to the host"),
        (own, "_finish", HAND_OVER),
        (own._idle_work, "beside_ticks", "recording between ticks"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, parts.timed(part, getattr(owner, name))))
        tick = parts.counted(parts.timed("rest of the ticks", own._tick))
        stack.enter_context(patch.object(own, "_tick", tick))
        denoiser = parts.timed("denoiser", Lane.evaluate, network=True)
        stack.enter_context(patch.object(Lane, "evaluate", denoiser))
        for owner, name, part in (
            (own._admission, "_encoder_of", "encoder"),
            (own._decoder, "_decoder_of", "decoder"),
        ):
            of = getattr(owner, name)
            stack.enter_context(
                patch.object(
                    owner,
                    name,
                    lambda *asked, of=of, part=part: parts.timed(part, of(*asked), network=True),
                )
            )
        yield


@contextmanager
def watched_session(parts: FrameParts) -> Generator[None]:
    """Record what sessions do outside the engine's thread inside the ``with`` block.

    Args:
        parts: where the calls are recorded.
    """
    decode, submit, hop, encode = BESIDE
    call_soon = FrameListener._call_soon  # pyright: ignore[reportPrivateUsage]

    def call_soon_timed(listener: FrameListener, call: Callable[[], None]) -> None:
        began = perf_counter()

        def arrived() -> None:
            parts.waited(hop, began)
            call()

        call_soon(listener, arrived)

    session: Any = stream.StreamSession
    with (
        patch.object(stream, "decoded_frame", parts.awaited(decode, stream.decoded_frame)),
        patch.object(session, "_begin", parts.timed(submit, session._begin)),
        patch.object(FrameListener, "_call_soon", call_soon_timed),
        patch.object(stream, "encode", parts.timed(encode, stream.encode)),
    ):
        yield
