"""Room is reserved before any work is done for a request, and given back when it is refused."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import Iterator
from time import monotonic, sleep
from typing import Any

import pytest
from PIL import Image

from server.decoding.pool import DecodePool
from server.engine.engine import Engine
from server.engine.tick.stage import Stage, run_stage
from server.errors import InvalidRequest, Overloaded, RowFailed
from server.requests.schema import GenerateRequest
from server.service import planner
from server.service import service as module
from server.service.pictures import Pictures
from server.service.service import Service
from server.settings import Limits
from tests.server.decoding.files import saved
from tests.server.decoding.test_pool import stopped
from tests.server.toy_model import Toy, started

MAX_PENDING = 4


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = started(Toy(), 8, max_pending=MAX_PENDING)
    yield made
    made.stop(0)


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
    made = Service(Limits(steps=50, images=MAX_PENDING))
    made.open(engine, {"toy": Toy()})
    yield made
    made.close()


def picture(side: int) -> str:
    return base64.b64encode(saved(Image.new("RGB", (side, side), "white"), "PNG")).decode()


def make(service: Service, **fields: Any) -> Pictures:
    async def run() -> Pictures:
        request = GenerateRequest.model_validate({"prompt": "x", "steps": 2} | fields)
        generation = await service.admit(request, "one")
        try:
            return await service.pictures(generation)
        finally:
            service.release(generation)

    return asyncio.run(run())


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The costly work that the service does, in order."""
    seen: list[str] = []

    def noting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    for name in ("resolve", "make_plan"):
        noting(planner, name)
    noting(module, "tasks_of")
    for name in ("picture", "mask"):
        noting(DecodePool, name)
    return seen


def test_a_request_that_finds_the_queue_full_costs_nothing(
    service: Service, engine: Engine, done: list[str]
) -> None:
    upload = {"image": picture(1024), "mask": picture(1024), "width": 32, "height": 32}
    with engine.reserve(MAX_PENDING), pytest.raises(Overloaded):
        make(service, **upload)
    assert done == []
    assert len(make(service, **upload).pictures) == 1
    assert done == ["resolve", "make_plan", "tasks_of", "picture", "mask", "tasks_of"]


def test_a_request_that_is_refused_for_its_settings_costs_no_decoding(
    service: Service, done: list[str]
) -> None:
    with pytest.raises(InvalidRequest, match="steps"):
        make(service, image=picture(1024), width=32, height=32, steps=51)
    assert done == ["resolve"]


def test_an_image_that_gives_its_size_is_decoded_first(service: Service, done: list[str]) -> None:
    make(service, image=picture(64), width=32)
    assert done == ["picture", "resolve", "make_plan", "tasks_of", "tasks_of"]


def test_too_many_images_are_refused_for_good_and_not_until_there_is_room(
    service: Service, engine: Engine
) -> None:
    with engine.reserve(MAX_PENDING), pytest.raises(InvalidRequest) as caught:
        make(service, n=MAX_PENDING + 1)
    assert caught.value.field == "n"


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "no picture"},
        {"steps": 51},
        {"guidance": {"name": "none", "policy": "adaptive"}},
        {"spacing": "custom"},
        {"guidance": {"name": "cfg", "perturbed": [{"name": "pag", "start": 0.9}]}},
        {"guidance": {"name": "composed", "prompts": [{"prompt": str(k)} for k in range(8)]}},
    ],
    ids=["upload", "limit", "guidance", "plan", "window", "rows"],
)
def test_a_refused_request_gives_its_room_back(
    service: Service, engine: Engine, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        make(service, n=MAX_PENDING, **fields)
    assert engine.measurements.pending == 0
    assert len(make(service, n=MAX_PENDING).pictures) == MAX_PENDING


def test_a_client_that_leaves_during_decoding_gives_its_room_back(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerateRequest.model_validate(
        {"prompt": "x", "n": MAX_PENDING, "image": picture(64)}
    )
    decoding = asyncio.Event()

    async def for_ever(*_: Any) -> None:
        decoding.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(DecodePool, "picture", for_ever)

    async def leave() -> None:
        admitting = asyncio.ensure_future(service.admit(request, "one"))
        await asyncio.wait_for(decoding.wait(), 60)
        assert engine.measurements.pending == MAX_PENDING
        admitting.cancel()
        await asyncio.wait([admitting])

    asyncio.run(leave())
    assert engine.measurements.pending == 0


def test_slow_uploads_do_not_delay_what_needs_no_upload(engine: Engine) -> None:
    service = Service(Limits(), decode_processes=1)
    service.open(engine, {"toy": Toy()})
    body = {"prompt": "x", "steps": 2, "width": 32, "height": 32}

    async def post(identifier: str, **fields: Any) -> None:
        request = GenerateRequest.model_validate(body | fields)
        generation = await service.admit(request, identifier)
        try:
            await service.pictures(generation)
        finally:
            service.release(generation)

    async def run() -> int:
        decoder = await stopped(service.decoding)
        uploads = [
            asyncio.ensure_future(post(f"{k}", image=picture(64))) for k in range(MAX_PENDING - 1)
        ]
        await asyncio.sleep(0)
        await post("plain")
        left = sum(not upload.done() for upload in uploads)
        decoder.send_signal(signal.SIGCONT)
        await asyncio.gather(*uploads)
        return left

    assert asyncio.run(run()) == MAX_PENDING - 1
    service.close()


def test_both_runs_of_a_request_are_admitted_at_once_and_nothing_of_them_is_left(
    service: Service, engine: Engine
) -> None:
    """Between the two runs, another client cannot take the room that the second run needs."""

    async def run() -> Pictures:
        fields = {"prompt": "x", "steps": 50, "n": MAX_PENDING // 2, "hires": {"strength": 1}}
        generation = await service.admit(GenerateRequest.model_validate(fields), "one")
        try:
            with pytest.raises(Overloaded):
                engine.reserve(1)
            made = await service.pictures(generation)
        finally:
            service.release(generation)
        return made

    made = asyncio.run(run())
    assert made.spent == 2 * 50 * 2 * (MAX_PENDING // 2)
    engine.reserve(MAX_PENDING).release()
    with pytest.raises(InvalidRequest, match="drawn twice, so at most 2 are allowed"):
        make(service, n=MAX_PENDING // 2 + 1, hires={})
    engine.reserve(MAX_PENDING).release()


@pytest.mark.parametrize("stage", [1, 3], ids=["first run", "second run"])
def test_a_request_of_two_runs_gives_all_its_room_back_if_one_of_them_fails(
    stage: int, service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = iter(range(100))

    def breaking(*given: Any) -> Stage:
        if next(stages) >= stage:
            raise RuntimeError("broken")
        return run_stage(*given)

    monkeypatch.setattr("server.engine.stages.run_stage", breaking)
    with pytest.raises(RowFailed):
        make(service, n=MAX_PENDING // 2, hires={"strength": 1})
    ends = monotonic() + 60
    while engine.measurements.pending and monotonic() < ends:
        sleep(0.01)
    assert engine.waiting() == {}
    engine.reserve(MAX_PENDING).release()
