"""Uploads are decoded in other processes; a file that breaks its decoder harms nothing else."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.decoding.pool import DecodePool
from server.decoding.sizing import PictureTarget
from server.decoding.worker import NICENESS
from server.errors import InvalidRequest, Overloaded, TooLarge, WeftError
from server.settings import Limits
from tests.server.decoding.files import repeated_scans, saved

RED = saved(Image.new("RGB", (32, 16), (255, 0, 0)), "PNG")
SLOW = repeated_scans(2048, 2048, 20)


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    made = DecodePool(Limits(), processes=1, waiting=1)
    yield made
    made.close()


def processes(pool: DecodePool) -> list[int]:
    return [worker._process.pid for worker in pool._idle]


async def stopped(pool: DecodePool) -> subprocess.Popen[bytes]:
    """The only process of a pool, which gets no time until it is told to go on."""
    await pool.picture(RED, "image")
    process = pool._idle[0]._process
    process.send_signal(signal.SIGSTOP)
    return process


async def taken(pool: DecodePool) -> None:
    """Wait until the process has been given a picture."""
    async with asyncio.timeout(60):
        while pool._idle:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def children() -> set[str]:
    """Child processes of this one that have not ended."""
    found: set[str] = set()
    for thread in Path("/proc/self/task").iterdir():
        # Threads of other tests may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            found.update((thread / "children").read_text().split())
    return found


def test_files_and_base64_become_pixels_of_the_size_that_is_asked_for(pool: DecodePool) -> None:
    async def run() -> None:
        own = await pool.picture(RED, "image")
        assert own.shape == (16, 32, 3)
        assert own.reshape(-1, 3).tolist() == [[255, 0, 0]] * 512
        wide = await pool.picture(base64.b64encode(RED).decode(), "image", PictureTarget(width=64))
        assert wide.shape == (32, 64, 3)
        large = saved(Image.new("L", (2000, 3000)), "PNG")
        drawable = await pool.picture(large, "image", PictureTarget(multiple=32))
        assert drawable.shape == (1248, 832, 3)
        grey = await pool.mask(RED, "mask", PictureTarget(8, 8))
        assert grey.shape == (8, 8)
        assert grey.dtype == np.uint8

    asyncio.run(run())
    assert len(processes(pool)) == 1


def test_decoding_leaves_the_processor_to_the_models(pool: DecodePool) -> None:
    asyncio.run(pool.picture(RED, "image"))
    (process,) = processes(pool)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process) == min(own + NICENESS, 19)


def test_a_size_that_no_image_may_have_costs_no_memory(pool: DecodePool) -> None:
    pixels = asyncio.run(pool.picture(RED, "image", PictureTarget(16384, 16384)))
    assert pixels.shape == (16, 32, 3)


def test_a_refusal_names_the_field_and_keeps_the_process(pool: DecodePool) -> None:
    asyncio.run(pool.picture(RED, "image"))
    before = processes(pool)
    with pytest.raises(InvalidRequest, match=r"^mask is not valid base64") as refused:
        asyncio.run(pool.mask("\ud800 é", "mask"))
    assert refused.value.field == "mask"
    with pytest.raises(TooLarge, match=r"^image is a JPEG of "):
        asyncio.run(pool.picture(repeated_scans(16, 16, 99), "image"))
    assert processes(pool) == before


def test_a_picture_that_takes_too_long_is_refused_and_its_process_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a loaded machine, the process may get its processor time late.
    monkeypatch.setattr("server.decoding.pool.STARVATION_FACTOR", 600)
    pool = DecodePool(Limits(decode_s=0.1), processes=1, waiting=1)
    with pytest.raises(TooLarge, match=r"^image takes longer than 0.1 s to decode"):
        asyncio.run(pool.picture(SLOW, "image"))
    assert processes(pool) == []
    pool._limits = Limits()
    assert asyncio.run(pool.picture(RED, "image")).shape == (16, 32, 3)
    pool.close()


def test_a_picture_that_needs_too_much_memory_is_refused() -> None:
    pool = DecodePool(Limits(), processes=1, waiting=1)
    pool._memory = 48 * 2**20
    large = saved(Image.new("RGB", (2048, 2048)), "PNG")
    with pytest.raises(TooLarge, match=r"^image needs more memory"):
        asyncio.run(pool.picture(large, "image"))
    assert asyncio.run(pool.picture(RED, "image")).shape == (16, 32, 3)
    pool.close()


def test_a_process_that_was_killed_is_replaced_unnoticed(pool: DecodePool) -> None:
    asyncio.run(pool.picture(RED, "image"))
    pool._idle[0]._process.kill()
    pool._idle[0]._process.wait()
    assert asyncio.run(pool.picture(RED, "image")).shape == (16, 32, 3)


def test_a_process_that_dies_of_a_picture_blames_the_picture(pool: DecodePool) -> None:
    async def run() -> None:
        process = await stopped(pool)
        decoding = asyncio.ensure_future(pool.picture(RED, "image"))
        await taken(pool)
        process.kill()
        with pytest.raises(InvalidRequest, match=r"^image is a damaged image file"):
            await decoding

    asyncio.run(run())


def test_a_process_that_does_not_start_in_time_is_ended_and_the_client_may_try_again(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setattr("server.decoding.pool.START_S", 0.0)
    with pytest.raises(Overloaded, match=r"did not start within 0 s; try again in 2 s"):
        asyncio.run(pool.picture(RED, "image"))
    assert children() == before
    monkeypatch.undo()
    assert asyncio.run(pool.picture(RED, "image")).shape == (16, 32, 3)


def test_a_process_that_ends_while_it_starts_is_an_error_with_a_sentence(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.decoding.pool.sys.executable", "/bin/false")
    with pytest.raises(WeftError, match=r"images ended while it started"):
        asyncio.run(pool.picture(RED, "image"))


def test_a_picture_has_its_seconds_however_busy_the_processor_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.decoding.pool.STARVATION_FACTOR", 600)
    pool = DecodePool(Limits(decode_s=0.2), processes=1, waiting=1)
    asyncio.run(pool.picture(RED, "image"))
    process = pool._idle[0]._process
    process.send_signal(signal.SIGSTOP)
    later = Timer(0.4, process.send_signal, [signal.SIGCONT])
    later.start()
    assert asyncio.run(pool.picture(RED, "image")).shape == (16, 32, 3)
    later.join()
    pool.close()


# The first fits in a pipe's buffer; the second does not.
@pytest.mark.parametrize("picture", [RED, bytes(2**20)], ids=["small", "large"])
def test_a_process_that_gets_no_time_is_ended_and_its_picture_may_come_again(
    picture: bytes,
) -> None:
    pool = DecodePool(Limits(decode_s=0.05), processes=1, waiting=1)
    asyncio.run(pool.picture(RED, "image"))
    process = pool._idle[0]._process
    process.send_signal(signal.SIGSTOP)
    # Without a limit the test would end in another error, since the process is gone.
    rescue = Timer(60, process.kill)
    rescue.start()
    with pytest.raises(Overloaded, match=r"^The processor was too busy to decode"):
        asyncio.run(pool.picture(picture, "image"))
    rescue.cancel()
    assert processes(pool) == []
    pool.close()


def test_only_so_many_pictures_wait_and_one_whose_client_left_counts_until_it_is_done(
    pool: DecodePool,
) -> None:
    async def run() -> None:
        process = await stopped(pool)
        decoding = [asyncio.ensure_future(pool.picture(RED, "image")) for _ in range(2)]
        await taken(pool)
        with pytest.raises(Overloaded, match="Too many uploaded images"):
            await pool.picture(RED, "image")
        decoding[1].cancel()
        await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(pool.picture(RED, "image"))
        await asyncio.sleep(0)
        decoding[0].cancel()
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await pool.picture(RED, "image")
        process.send_signal(signal.SIGCONT)
        assert (await waiting).shape == (16, 32, 3)

    asyncio.run(run())


def test_a_frame_of_a_stream_passes_the_uploads_that_wait_and_needs_no_room(
    pool: DecodePool,
) -> None:
    async def run() -> None:
        process, ended = await stopped(pool), list[asyncio.Future[Any]]()
        first, second = (asyncio.ensure_future(pool.picture(RED, "image")) for _ in range(2))
        await taken(pool)
        with pytest.raises(Overloaded):
            await pool.picture(RED, "image")
        frame = asyncio.ensure_future(pool.frame(RED, PictureTarget(8, 8)))
        await asyncio.sleep(0)
        for one in (first, second, frame):
            one.add_done_callback(ended.append)
        process.send_signal(signal.SIGCONT)
        assert (await frame).shape == (8, 8, 3)
        await second
        assert ended == [first, frame, second]

    asyncio.run(run())


def test_whoever_waits_when_the_pool_is_closed_hears_of_it() -> None:
    async def run() -> None:
        pool = DecodePool(Limits(), processes=1, waiting=1)
        process = await stopped(pool)
        uploads = [asyncio.ensure_future(pool.picture(RED, "image")) for _ in range(2)]
        await taken(pool)
        pool.close()
        done, left = await asyncio.wait(uploads[1:], timeout=60)
        assert not left
        assert all(one.cancelled() for one in done)
        process.send_signal(signal.SIGCONT)
        await uploads[0]

    asyncio.run(run())


def test_a_picture_whose_client_left_before_its_turn_is_let_go_of(pool: DecodePool) -> None:
    class Text(str):
        """A text that can be watched."""

    async def run() -> None:
        process = await stopped(pool)
        first = asyncio.ensure_future(pool.picture(RED, "image"))
        await taken(pool)
        text = Text("no picture")
        watched = weakref.ref(text)
        waiting = asyncio.ensure_future(pool.picture(text, "image"))
        del text
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting
        gc.collect()
        assert watched() is None
        assert not first.done()
        process.send_signal(signal.SIGCONT)
        await first

    asyncio.run(run())


def test_a_pool_that_nobody_closes_leaves_no_process() -> None:
    pool = DecodePool(Limits(), processes=1, waiting=1)
    asyncio.run(pool.picture(RED, "image"))
    (process,) = processes(pool)
    del pool
    until = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and time.monotonic() < until:
        # Its thread may still be about to release it.
        time.sleep(0.01)
        gc.collect()
    assert not Path(f"/proc/{process}").exists()


def test_the_process_knows_nothing_of_the_server_s_environment(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_API_KEYS", "secret")
    asyncio.run(pool.picture(RED, "image"))
    (process,) = processes(pool)
    assert b"secret" not in Path(f"/proc/{process}/environ").read_bytes()
