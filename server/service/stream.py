"""A live stream: changeable settings, input frames of which only the newest waits, and outputs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from server.engine.task import Stream
from server.errors import InvalidRequest, NotReady, Overloaded, RowFailed, TooLarge, WeftError
from server.image_codec import encode
from server.models.blend import Blend
from server.models.references import SeenPicture
from server.requests.adapters import load_adapters
from server.requests.checks.limits import check_limits, check_tokens
from server.requests.embeddings import load_embeddings, texts_of, unfit_embeddings
from server.requests.start_noise import MAX_SEED
from server.requests.stream_schema import IMAGE_FIELDS, StreamSettings, read_settings
from server.requests.tasks import tasks_of
from server.requests.upload import Upload
from server.service.image_prompt_uses import image_prompt_uses
from server.service.model_shelf import Lease
from server.service.pixels import pixels_tensor
from server.service.service import Service
from server.service.similarity import FrameFilter
from server.service.stream_counts import SessionCounts
from server.service.stream_frame import (
    FailedFrame,
    Frame,
    FrameListener,
    InputFrame,
    OutputFrame,
)
from server.service.stream_input import FramePixels, check_source, decoded_frame
from server.service.transition import Transition
from server.service.uploads import EarlyImages, Uploads, decoded

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.reservation import Reservation
    from server.models.adapters.adapter import Weighted
    from server.models.embeddings.embedding import Embedding
    from server.models.hosted import HostedModel
    from server.models.image_prompts.image_prompt import ImagePromptUse
    from server.requests.resolve import Prepared
    from server.settings import Limits, StreamLimits

__all__ = ["StreamSession"]

log = logging.getLogger("weft")

OUTGOING: Final = 2
"""Number of finished frames that may wait for the client; with this many, none is taken in."""

RETRY_S: Final = 0.02
"""Seconds until a retry when the engine's queue was full."""


class PromptImages(NamedTuple):
    """Pictures that are given with the prompt of every frame.

    Attributes:
        image_prompts: loaded image prompts.
        references: reference images, ``[3, H, W]``, without the input frame.
        seen: reference images as the text encoder sees them, if it does.
    """

    image_prompts: tuple[ImagePromptUse, ...] = ()
    references: tuple[Tensor, ...] = ()
    seen: tuple[SeenPicture, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Current:
    """The current settings, checked and planned.

    Attributes:
        settings: settings as sent.
        prepared: prepared request for one frame.
        lease: lease of the model, which stays loaded as long as frames may need it.
        adapters: adapters of the settings, loaded once for all frames.
        embeddings: embeddings that its texts name, and those of the prompt that a transition
            leaves.
        beside: pictures of the settings, decoded and loaded once for all frames.
        in_flight: maximum number of frames in the engine.
    """

    settings: StreamSettings
    prepared: Prepared
    lease: Lease
    adapters: tuple[Weighted, ...]
    embeddings: tuple[Embedding, ...]
    beside: PromptImages
    in_flight: int

    @property
    def model(self) -> HostedModel:
        """The model that serves the stream."""
        return self.lease.model

    def leaving(self, before: Current) -> Current:
        """These settings with the embeddings of earlier ones, whose prompts frames still use."""
        own = {one.name for one in self.embeddings}
        theirs = [one for one in before.embeddings if one.name not in own]
        return replace(self, embeddings=(*self.embeddings, *theirs))


class StreamSession:
    """A client's stream; all of it belongs to the event loop.

    Args:
        service: service that plans frames and has the engine.
        limits: limits of one image.
        stream_limits: limits of one stream.
        counts: counts of this session.
        identifier: identifier of this session.

    Attributes:
        next_number: number of the next frame to be taken in.
    """

    def __init__(
        self,
        service: Service,
        limits: Limits,
        stream_limits: StreamLimits,
        counts: SessionCounts,
        identifier: str,
    ) -> None:
        self.id = identifier
        self.counts = counts
        self._service = service
        self._limits = limits
        self._stream_limits = stream_limits
        self._stream = Stream()
        self.loop = asyncio.get_running_loop()
        self._fields: Mapping[str, Any] = {}
        self._current: Current | None = None
        self._transition = Transition("")
        self._filter = FrameFilter(0)
        self._waiting: InputFrame | None = None
        self._owed = 0
        self.next_number = 0
        self._not_before = 0.0
        self._under_way: deque[Frame] = deque()
        self._sending: Frame | None = None
        self._last_image: bytes | None = None
        self._error: WeftError | None = None
        self._closed = False
        self._changing = asyncio.Lock()
        self._room = asyncio.Event()
        self._news = asyncio.Event()
        self._pump = asyncio.create_task(self._take_in_frames())

    @property
    def stats_s(self) -> float | None:
        """Seconds between two messages with statistics; None if there are none."""
        return None if self._current is None else self._current.settings.stats_s

    @property
    def begun(self) -> bool:
        """Whether the client has sent settings."""
        return self._current is not None

    async def change(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge fields into the settings; they apply to all frames taken in afterwards.

        Args:
            fields: fields of :class:`StreamSettings`; None restores the default of a field.

        Returns:
            The response to the client.

        Raises:
            InvalidRequest: a field has an invalid value; the settings are unchanged.
            UnknownModel: no such model is hosted.
            ModelMismatch: the model would have to be loaded, but cannot be.
            ModelTooLarge: the model does not fit in memory.
            Overloaded: the adapters of running requests leave no room for those of the settings, or
                too many pictures wait to be decoded.
            NotReady: the server is broken or about to stop.
        """
        merged = {k: v for k, v in {**self._fields, **fields}.items() if v is not None}
        settings = read_settings(merged)
        self._service.ready_engine()
        lease = await self._service.ready_shelf().lend(settings.model, live=True)
        try:
            prepared = await asyncio.to_thread(self._prepare, settings, lease.model)
            uploads = await self._decoded_beside(settings, merged, prepared, lease.model)
            load = partial(self._loaded, settings, prepared, lease, uploads)
            current = await self._service.with_weights(prepared.request, lease.model, load)
            async with self._changing:
                self._adopt(current)
                # One seed for the whole stream, even if it was chosen here.
                self._fields = merged | {"seed": current.prepared.request.seed}
                first = self.next_number
        except BaseException:
            lease.release()
            raise
        self._room.set()
        return {
            "settings": _answer(current),
            "session": self.id,
            "from_frame": first,
            "stages": current.prepared.plan.evaluations,
            "warnings": list(current.prepared.warnings),
            "notes": list(current.prepared.notes),
        }

    def offer(self, data: bytes) -> FailedFrame | None:
        """Accept an input frame, which replaces the one that waits.

        Returns:
            Why the frame is refused; None if it is accepted.
        """
        number, self.counts.received = self.counts.received, self.counts.received + 1
        limit = self._stream_limits.frame_bytes
        if self._current is None:
            error = InvalidRequest(None, "Send the settings as JSON before the first frame.")
            return FailedFrame(error, None, number)
        if len(data) > limit:
            self.counts.count("failed")
            error = TooLarge("frame", f"frame has {len(data)} bytes; at most {limit} are allowed.")
            return FailedFrame(error, None, number)
        if self._current.settings.source == "text":
            self.counts.count("dropped")
            return None
        if self._waiting is not None:
            self.counts.count("dropped")
        self._waiting = InputFrame(number, data, monotonic())
        self._room.set()
        return None

    async def next(self) -> OutputFrame | FailedFrame:
        """Wait for the next output; calling again means that the client has received the last one.

        Raises:
            NotReady: the engine failed, or the server is about to stop.
        """
        self._sending = None
        self._room.set()
        while self._error is None and not (self._under_way and self._under_way[0].done):
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        frame = self._sending = self._under_way.popleft()
        return await self._output(frame)

    def statistics(self) -> Mapping[str, Any]:
        """Statistics of the stream for the client."""
        return self.counts.statistics(self._in_engine)

    def end(self, error: WeftError) -> None:
        """Deliver an error instead of the next output."""
        self._error = self._error or error
        self._news.set()

    def close(self) -> None:
        """Stop: frames under way end at the engine's next tick."""
        self._closed = True
        self._pump.cancel()
        # Both refer to tracebacks with this session: cycles, which would keep its pictures in
        # memory until the next collection.
        del self._pump
        self._error = None
        for frame in self._under_way:
            if frame.submission is not None and not frame.done:
                frame.submission.cancel()
        if self._current is not None:
            self._current.lease.release()

    @property
    def _in_engine(self) -> int:
        return sum(not frame.done for frame in self._under_way)

    @property
    def _in_denoiser(self) -> int:
        return sum(not (frame.denoised or frame.done) for frame in self._under_way)

    @property
    def full(self) -> bool:
        """Whether as many finished frames wait for the client as may; then no frame is taken in."""
        finished = sum(frame.done for frame in self._under_way)
        return finished + (self._sending is not None) >= OUTGOING

    def _prepare(self, settings: StreamSettings, model: HostedModel) -> Prepared:
        """Check and plan settings, in a separate thread."""
        from_frames = settings.source == "frames"
        if not from_frames and settings.strength is not None:
            raise InvalidRequest(
                "strength",
                f"strength is {settings.strength:g}; it needs source 'frames', so set it to null.",
            )
        for part in ("particles", "negtome"):
            if settings.guidance is not None and getattr(settings.guidance, part) is not None:
                raise InvalidRequest(
                    f"guidance.{part}",
                    f"guidance.{part} needs several images at once, but the frames of a stream are "
                    "made one by one; leave it out.",
                )
        check_source(settings, model.facts)
        size = model.facts.default_width, model.facts.default_height
        request = settings.request()
        if settings.source == "references":
            # The checks count the frame, which does not exist yet.
            references = Upload(b""), *request.reference_images
            request = request.model_copy(update={"reference_images": references})
        prepared, _ = self._service.planner.prepare(request, model, size if from_frames else None)
        for one in settings.prompt[1:]:
            alone = prepared.request.model_copy(update={"prompt": one.text})
            check_limits(alone, self._limits)
            check_tokens(alone, model)
        # Anything incompatible with a blend is refused now, and not at each frame.
        blended = settings.transition_frames > 0 or isinstance(settings.prompt_or_blend, Blend)
        blend = Blend(((settings.prompt_or_blend, 1.0),)) if blended else None
        tasks_of(prepared, model, blend=blend, adapters=(), embeddings=())
        unfit = unfit_embeddings([one.text for one in settings.prompt[1:]], model)
        return replace(prepared, warnings=(*dict.fromkeys((*prepared.warnings, *unfit)),))

    async def _decoded_beside(
        self,
        settings: StreamSettings,
        fields: Mapping[str, Any],
        prepared: Prepared,
        model: HostedModel,
    ) -> Uploads | None:
        """Decode the pictures besides the prompt; None if those of the current settings stay."""
        before, request = self._current, prepared.request
        if before is not None and before.model is model:
            was = before.prepared.request
            same_size = (was.width, was.height) == (request.width, request.height)
            same = [fields.get(field) == self._fields.get(field) for field in IMAGE_FIELDS]
            if same_size and all(same):
                return None
        return await decoded(
            settings.request(), prepared, model, EarlyImages(), self._service.decoding
        )

    def _loaded(
        self,
        settings: StreamSettings,
        prepared: Prepared,
        lease: Lease,
        uploads: Uploads | None,
    ) -> Current:
        """Load the weights that settings name, in the thread that may wait for them.

        Args:
            settings: settings as sent.
            prepared: prepared request for one frame.
            lease: lease of the model.
            uploads: pictures besides the prompt; None if the earlier ones stay.
        """
        in_flight, model = self._most_in_flight(settings, prepared), lease.model
        adapters = load_adapters(prepared.request.adapters, model)
        texts = [text for _, text in texts_of(prepared.request, model)]
        texts += [one.text for one in settings.prompt[1:]]
        embeddings = load_embeddings(texts, model)
        if uploads is not None:
            beside = PromptImages(
                image_prompt_uses(prepared.request, uploads, model),
                tuple(map(pixels_tensor, uploads.references.read)),
                tuple(map(SeenPicture.of, uploads.references.seen)),
            )
        else:
            beside = PromptImages() if self._current is None else self._current.beside
        return Current(settings, prepared, lease, adapters, embeddings, beside, in_flight)

    def _most_in_flight(self, settings: StreamSettings, prepared: Prepared) -> int:
        limit = self._stream_limits.in_flight
        if settings.in_flight is None:
            return min(limit, prepared.plan.evaluations + 2)
        if settings.in_flight > limit:
            raise InvalidRequest(
                "in_flight", f"in_flight is {settings.in_flight}; at most {limit} is allowed."
            )
        return settings.in_flight

    def _adopt(self, current: Current) -> None:
        before, settings = self._current, current.settings
        frames = settings.transition_frames
        if before is None or before.model is not current.model:
            self._transition = Transition(settings.prompt_or_blend)
        else:
            self._transition = self._transition.to(settings.prompt_or_blend, frames, settings.blend)
            if self._transition.under_way:
                current = current.leaving(before)
        seed = current.prepared.request.seed
        if before is None or seed != before.prepared.request.seed:
            self._filter = FrameFilter(seed)
        self._filter.forget()
        if settings.source == "text" and self._waiting is not None:
            self._waiting = None
            self.counts.count("dropped")
        self._owed = max(1, self._transition.left)
        self._current = current
        if self._closed:
            current.lease.release()
        if before is not None:
            # Frames in the engine keep its model loaded by themselves.
            before.lease.release()

    async def _take_in_frames(self) -> None:
        try:
            while True:
                self._room.clear()
                current = self._current
                if current is None or not self._may_take(current):
                    await self._room.wait()
                    continue
                early = self._not_before - monotonic()
                if early > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(early):
                            await self._room.wait()
                    continue
                async with self._changing:
                    # The settings may have changed while it waited for the lock.
                    if self._current is not None and self._may_take(self._current):
                        await self._take_in(self._current)
        except Exception as error:
            log.exception("stream %s failed", self.id)
            self.end(error if isinstance(error, WeftError) else WeftError("The stream failed."))

    def _may_take(self, current: Current) -> bool:
        settings = current.settings
        if settings.source == "text":
            there_is = settings.seed_step > 0 or self._owed > 0
        else:
            there_is = self._waiting is not None
        # The frame before must have started, or both would pass the stages side by side.
        started = all(frame.started or frame.done for frame in self._under_way)
        return (
            there_is
            and started
            and not settings.paused
            and not self.full
            and self._in_engine < current.in_flight
            # One is left for the decoder, so that the next frame is encoded while it is decoded.
            # More than one for each stage would only wait for each other.
            and self._in_denoiser
            < max(1, min(current.in_flight - 1, current.prepared.plan.evaluations))
        )

    async def _take_in(self, current: Current) -> None:
        """Submit the next frame to the engine, or skip it."""
        settings, number = current.settings, self.next_number
        taken, self._waiting = self._waiting, None
        frame = Frame(
            number=number,
            source=None if taken is None else taken.number,
            seed=(current.prepared.request.seed + number * settings.seed_step) % (MAX_SEED + 1),
            arrived=monotonic() if taken is None else taken.arrived,
            output_format=settings.output_format,
        )
        now = monotonic()
        # Added before it is submitted, so that closing the stream finds it.
        self._under_way.append(frame)
        try:
            with self._service.ready_engine().reserve(1, live=True) as room:
                pixels = None
                if taken is not None:
                    shared = settings, current.prepared.request, current.model.facts
                    pixels = await decoded_frame(taken.data, *shared, self._service.decoding)
                await asyncio.to_thread(self._begin, frame, current, pixels, room)
        except Overloaded:
            self._under_way.remove(frame)
            self._put_back(taken)
            self._not_before = now + RETRY_S
        except NotReady as error:
            self.end(error)
        except WeftError as error:
            self.counts.count("failed")
            # The traceback's frames refer to this frame and the stream.
            frame.number, frame.error = None, error.with_traceback(None)
            # Paced, or it would be refused again at once for as long as the reason lasts.
            self._pace(settings, now)
        else:
            self.next_number += 1
            self._transition = self._transition.onward()
            self._pace(settings, now)
        self._news.set()

    def _pace(self, settings: StreamSettings, now: float) -> None:
        """Count a frame as answered, and schedule the next one by the maximum frame rate."""
        self._owed = max(0, self._owed - 1)
        self._not_before = max(self._not_before + 1 / settings.max_fps, now)

    def _put_back(self, taken: InputFrame | None) -> None:
        if taken is None:
            return
        if self._waiting is None:
            self._waiting = taken
        else:
            self.counts.count("dropped")
        self._room.set()

    def _begin(
        self,
        frame: Frame,
        current: Current,
        pixels: FramePixels | None,
        room: Reservation,
    ) -> None:
        """Submit a frame or skip it, in a separate thread.

        Args:
            frame: frame to submit.
            current: settings of the frame.
            pixels: pixels of the input frame, if there is one.
            room: room for it in the engine.
        """
        image, (image_prompts, references, seen) = None, current.beside
        if pixels is not None:
            image = pixels_tensor(pixels.read)
            wanted = current.settings.similarity_filter
            must = self._transition.under_way
            if wanted is not None and self._filter.skips(image, wanted, must_run=must):
                frame.skipped = True
                return
            if current.settings.source == "references":
                image, references = None, (image, *references)
                if pixels.seen is not None:
                    seen = SeenPicture.of(pixels.seen), *seen
        prompt = self._transition.prompt
        request = current.prepared.request.model_copy(update={"seed": frame.seed})
        try:
            tasks = tasks_of(
                replace(current.prepared, request=request),
                current.model,
                image=image,
                blend=prompt if isinstance(prompt, Blend) else None,
                stream=self._stream,
                adapters=current.adapters,
                embeddings=current.embeddings,
                image_prompts=image_prompts,
                references=references,
                seen=seen,
            )
            frame.submitted = monotonic()
            frame.submission = room.submit(tasks, FrameListener(frame, self.loop, self._heard))
        except WeftError:
            # There will be no new image that skipped frames could repeat.
            self._filter.forget()
            raise
        if self._closed:
            frame.submission.cancel()

    def _heard(self) -> None:
        self._room.set()
        self._news.set()

    async def _output(self, frame: Frame) -> OutputFrame | FailedFrame:
        result = frame.result
        if result is not None:
            pixels = result.pixels
            self._last_image = await asyncio.to_thread(encode, pixels, frame.output_format)
        elif frame.error is None and self._last_image is None:
            frame.error = RowFailed("The frame was skipped, and there is no image before it.")
        if isinstance(frame.error, NotReady):
            raise frame.error
        if frame.error is not None or frame.number is None or self._last_image is None:
            error = frame.error or RowFailed("The frame has no image.")
            return self._failed(frame, error)
        total_s = monotonic() - frame.arrived
        self.counts.count_sent(total_s, skipped=frame.skipped)
        waited = 0.0 if result is None else frame.submitted - frame.arrived + result.queue_s
        return OutputFrame(
            number=frame.number,
            source=frame.source,
            seed=frame.seed,
            skipped=frame.skipped,
            dropped=self.counts.frames["dropped"],
            data=self._last_image,
            output_format=frame.output_format,
            queue_s=waited,
            denoise_s=0.0 if result is None else result.denoise_s,
            decode_s=0.0 if result is None else result.decode_s,
            total_s=total_s,
        )

    def _failed(self, frame: Frame, error: WeftError) -> FailedFrame:
        if frame.number is not None:
            # Counted here, since only failures in the engine have a number.
            self.counts.count("failed")
            self._filter.forget()
        return FailedFrame(error, frame.number, frame.source)


def _answer(current: Current) -> dict[str, Any]:
    """Settings with every default filled in, which can open the same stream again."""
    settings = current.prepared.request.settings() | current.settings.own()
    # Some fields exist only in requests.
    known = {name: value for name, value in settings.items() if name in StreamSettings.model_fields}
    # The request counts the input frame as one of its reference images.
    known.pop("reference_images", None)
    beside = len(current.settings.reference_images)
    pictures = {"reference_images": beside} if beside else {}
    return known | pictures | {"in_flight": current.in_flight}
