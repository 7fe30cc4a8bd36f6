"""Processes that decode uploaded pictures: few, limited in time and memory, and replaceable."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import subprocess
import sys
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from dataclasses import field as of_dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from server.decoding.picture import WHITE, MaskForm
from server.decoding.sizing import PictureTarget
from server.decoding.turns import DecodingTurns
from server.decoding.worker import Answer, DecodingJob
from server.errors import InvalidRequest, Overloaded, TooLarge, WeftError
from server.settings import Limits

__all__ = ["DecodePool", "Decoded"]

log = logging.getLogger("weft")

ROOT: Final = Path(__file__).parents[2]

RETRY_AFTER_S: Final = 2.0

START_S: Final = 60.0

STARVATION_FACTOR: Final = 12
"""Factor on the decoding seconds after which a process that did not get them is given up."""

POLL_INTERVAL_S: Final = 0.01

OWN_SIZE: Final = PictureTarget()

OWN_BYTES: Final = 256 * 2**20
"""Address space of a process before it decodes anything, with some margin."""

BYTES_A_PIXEL: Final = 32
"""Peak bytes per pixel: four copies at 4 bytes, and the coefficients of a JPEG."""

COPIES_OF_A_FILE: Final = 4

MEMORY_RETURNED: Final = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Allocations larger than this return to the system as soon as they are freed."""


class Decoded(NamedTuple):
    """What was read from a picture: its pixels, or its texts."""

    pixels: NDArray[np.uint8]
    texts: dict[str, str]


@dataclass(slots=True, eq=False)
class _Picture:
    """A picture that waits for its turn, and the future of its result."""

    data: str | bytes
    field: str
    target: PictureTarget
    mask: MaskForm | None = None
    texts: bool = False
    read: Future[Decoded] = of_dataclass(default_factory=Future)


class DecodePool:
    """Decodes uploaded pictures in processes of its own, which start with the first upload.

    Frames of live streams go before other pictures and are never refused: a stream has one frame
    here at a time, and the number of streams has its own limit.

    A file that takes too long or crashes its process costs only that process. Nothing else waits
    for the pool: neither the event loop, nor the threads to which it hands other work.

    Args:
        limits: limits set by the operator: pixels and bytes of a picture, pixels of an image, and
            seconds of decoding, after which a process is replaced. These are seconds of processor
            time, since models may keep the processor busy: a picture is not refused for time that
            others take.
        processes: number of pictures decoded at once.
        waiting: number of other pictures that may wait for a process; more are refused.
    """

    def __init__(self, limits: Limits, *, processes: int, waiting: int) -> None:
        self._room = processes + waiting
        self._limits = limits
        self._memory = (
            OWN_BYTES
            + BYTES_A_PIXEL * max(limits.upload_pixels, limits.pixels)
            + COPIES_OF_A_FILE * limits.body_bytes
        )
        self._idle: list[_Worker] = []
        self._closed = False
        self._lock = Lock()
        self._turns: DecodingTurns[_Picture] = DecodingTurns()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="weft-decode")
        # If nobody closes the pool, its processes end with it.
        weakref.finalize(self, _end, self._idle)

    async def picture(
        self, data: str | bytes, field: str, target: PictureTarget = OWN_SIZE
    ) -> NDArray[np.uint8]:
        """Decode a picture to RGB; transparency is flattened over white.

        Args:
            data: base64 or a data URI if it is text, a PNG, JPEG or WebP file if it is bytes.
            field: field of the request, for error messages.
            target: size to resample to. A picture that would get more pixels than an image may have
                is not resampled.

        Returns:
            uint8 `[height, width, 3]`.

        Raises:
            InvalidRequest: it is not such a file, is damaged, or takes too long.
            TooLarge: it has too many pixels, scans or bytes.
            Overloaded: too many pictures wait to be decoded, no process starts in time, or the
                processor is too busy.
            WeftError: a process cannot start at all.
        """
        return (await self._uploaded(_Picture(data, field, target))).pixels

    async def frame(self, data: bytes, target: PictureTarget) -> NDArray[np.uint8]:
        """Decode an input frame of a live stream, before all pictures that are not frames.

        Args:
            data: a PNG, JPEG or WebP file.
            target: as for :meth:`picture`, which also describes the result and the errors.
        """
        return (await self._decoded(_Picture(data, "frame", target), frame=True)).pixels

    async def mask(
        self,
        data: str | bytes,
        field: str,
        target: PictureTarget = OWN_SIZE,
        form: MaskForm = WHITE,
    ) -> NDArray[np.uint8]:
        """Decode a mask to uint8 `[height, width]`, 255 where the picture is repainted.

        Errors are those of :meth:`picture`; a mask that would repaint nothing is refused too.

        Args:
            data: base64 or a data URI if it is text, a file if it is bytes.
            field: field of the request, for error messages.
            target: size to resample to.
            form: how the file marks what is repainted.
        """
        return (await self._uploaded(_Picture(data, field, target, form))).pixels

    async def texts(self, data: str | bytes, field: str) -> dict[str, str]:
        """Read a picture's texts about how it was made, by name.

        Arguments and errors are those of :meth:`picture`.
        """
        return (await self._uploaded(_Picture(data, field, OWN_SIZE, texts=True))).texts

    def close(self) -> None:
        """End the processes; one that is decoding ends after its picture."""
        with self._lock:
            self._closed = True
            _end(self._idle)
            waiting = list(iter(self._turns.next, None))
        self._threads.shutdown(wait=False, cancel_futures=True)
        for picture in waiting:
            picture.read.cancel()

    async def _uploaded(self, picture: _Picture) -> Decoded:
        with self._lock:
            if not self._room:
                raise Overloaded(RETRY_AFTER_S, "Too many uploaded images wait to be decoded.")
            self._room -= 1
        picture.read.add_done_callback(self._leave)
        return await self._decoded(picture, frame=False)

    def _leave(self, _: object) -> None:
        with self._lock:
            self._room += 1

    async def _decoded(self, picture: _Picture, *, frame: bool) -> Decoded:
        with self._lock:
            self._turns.add(picture, frame=frame)
            self._threads.submit(self._take_turn)
        try:
            return await asyncio.wrap_future(picture.read)
        finally:
            with self._lock:
                self._turns.withdraw(picture)

    def _take_turn(self) -> None:
        with self._lock:
            picture = self._turns.next()
        if picture is None or not picture.read.set_running_or_notify_cancel():
            return
        try:
            read = self._read(picture)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the pixels
            picture.read.set_exception(error)
        else:
            picture.read.set_result(read)

    def _read(self, picture: _Picture) -> Decoded:
        data = picture.data
        content = data.encode(errors="replace") if isinstance(data, str) else data
        job = DecodingJob(
            length=len(content),
            field=picture.field,
            mask=picture.mask,
            texts=picture.texts,
            encoded=isinstance(data, str),
            max_pixels=self._limits.upload_pixels,
            target=picture.target,
            max_resampled=self._limits.pixels,
        )
        worker = self._worker()
        try:
            return worker.decode(job, content, self._limits.decode_s)
        finally:
            with self._lock:
                if worker.alive and not self._closed:
                    self._idle.append(worker)
                else:
                    worker.end()

    def _worker(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                worker.end()
        return _Worker(self._memory)


class _Worker:
    """A decoding process, used by one thread at a time.

    Raises:
        Overloaded: it does not start in time.
        WeftError: it ends while it starts.
    """

    def __init__(self, memory: int) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with our own module
            [sys.executable, "-P", "-m", "server.decoding.worker", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Without the server's own environment, which may hold its keys.
            env={"PYTHONPATH": str(ROOT), **MEMORY_RETURNED},
            # The server handles a terminal's Ctrl-C.
            process_group=0,
        )
        self._jobs = cast("BufferedWriter", self._process.stdin)
        self._answers = cast("BufferedReader", self._process.stdout)
        # A process that reads nothing must not block the thread that writes.
        os.set_blocking(self._jobs.fileno(), False)
        self._await_start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._jobs, self._answers):
            pipe.close()

    def decode(self, job: DecodingJob, content: bytes, seconds: float) -> Decoded:
        try:
            answer = self._asked(job, content, seconds)
            if answer.refusal is None:
                return Decoded(self._pixels(answer.shape), answer.texts)
        except TimeoutError:
            self.end()
            raise TooLarge(
                job.field, f"{job.field} takes longer than {seconds:g} s to decode."
            ) from None
        except Overloaded:
            self.end()
            log.error("decoding %s got no processor time", job.field)
            raise
        except (OSError, EOFError, ValueError):
            self.end()
            log.warning("decoding %s ended its process: %s", job.field, self._process.returncode)
            raise InvalidRequest(
                job.field, f"{job.field} is a damaged image file and cannot be decoded."
            ) from None
        raise (TooLarge if answer.too_large else InvalidRequest)(job.field, answer.refusal)

    def _await_start(self) -> None:
        """Wait until the process is ready; its start must not count for the first picture."""
        try:
            ready = self._line(START_S)
        except TimeoutError:
            self.end()
            log.error("the decoding process did not start within %g s", START_S)
            raise Overloaded(
                RETRY_AFTER_S,
                f"The process that decodes uploaded images did not start within {START_S:g} s; "
                f"try again in {RETRY_AFTER_S:.0f} s.",
            ) from None
        if not ready:
            self.end()
            log.error("the decoding process ended with %s", self._process.returncode)
            raise WeftError("The process that decodes uploaded images ended while it started.")

    def _asked(self, job: DecodingJob, content: bytes, seconds: float) -> Answer:
        waited = _Waited(self._process.pid, seconds)
        self._write(json.dumps(asdict(job)).encode() + b"\n", waited)
        self._write(content, waited)
        answered = select.poll()
        answered.register(self._answers, select.POLLIN)
        waited.until(answered)
        return Answer(**json.loads(self._answers.readline()))

    def _write(self, data: bytes, waited: _Waited) -> None:
        pipe = self._jobs.fileno()
        taken = select.poll()
        taken.register(pipe, select.POLLOUT)
        left = memoryview(data)
        while left:
            waited.until(taken)
            left = left[os.write(pipe, left) :]

    def _line(self, within_s: float) -> bytes:
        answered = select.poll()
        answered.register(self._answers, select.POLLIN)
        if not answered.poll(1000 * within_s):
            raise TimeoutError
        return self._answers.readline()

    def _pixels(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        pixels = np.empty(shape, np.uint8)
        if self._answers.readinto(pixels.data.cast("B")) != pixels.nbytes:
            raise EOFError
        return pixels


class _Waited:
    """Time left to wait for a process, by its processor time and by the clock.

    Args:
        process: identifier of the process.
        seconds: seconds of processor time that it may take.
    """

    def __init__(self, process: int, seconds: float) -> None:
        self._process = process
        self._last = _processor_s(process) + seconds
        self._patience_s = STARVATION_FACTOR * seconds
        self._end = monotonic() + self._patience_s

    def until(self, ready: select.poll) -> None:
        """Wait for a pipe of the process.

        Raises:
            TimeoutError: it has used its processor time.
            Overloaded: it did not get its processor time.
        """
        while not ready.poll(1000 * max(POLL_INTERVAL_S, min(self._own_s(), self._clock_s()))):
            if self._own_s() <= 0:
                raise TimeoutError
            if self._clock_s() <= 0:
                raise Overloaded(
                    RETRY_AFTER_S,
                    "The processor was too busy to decode an uploaded image within "
                    f"{self._patience_s:g} s; try again in {RETRY_AFTER_S:.0f} s.",
                )

    def _own_s(self) -> float:
        return self._last - _processor_s(self._process)

    def _clock_s(self) -> float:
        return self._end - monotonic()


def _processor_s(process: int) -> float:
    """Processor seconds used by a process, or clock seconds if the system does not report any."""
    try:
        status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return monotonic()
    return (int(status[11]) + int(status[12])) / os.sysconf("SC_CLK_TCK")


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
