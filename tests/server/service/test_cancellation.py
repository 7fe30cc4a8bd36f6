"""A generation is either cancelled or answered with its pictures, never both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from server.engine.engine import Engine
from server.errors import Cancelled, UnknownGeneration
from server.requests.schema import GenerateRequest
from server.service import pictures
from server.service.service import Service
from server.settings import Limits
from tests.server.toy_model import Toy, started


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = started(Toy(), 8)
    yield made
    made.stop(0)


@pytest.fixture
def service(engine: Engine) -> Service:
    made = Service(Limits())
    made.open(engine, {"toy": Toy()})
    return made


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"prompt": "x", "steps": 2, "seed": 1} | fields)


async def answered(service: Service, asked: GenerateRequest, cancel: Awaitable[None]) -> bool:
    """Whether the request got its pictures, while `cancel` runs concurrently."""

    async def post() -> bool:
        try:
            generation = await service.admit(asked, "one")
        except Cancelled:
            return False
        try:
            await service.pictures(generation)
        except Cancelled:
            return False
        finally:
            service.release(generation)
        return True

    posted, _ = await asyncio.gather(post(), cancel)
    return posted


def test_a_cancelled_generation_has_no_pictures(service: Service) -> None:
    async def cancel() -> None:
        await asyncio.sleep(0)
        service.cancel("one")
        # Cancelling again changes nothing.
        service.cancel("one")

    assert not asyncio.run(answered(service, request(steps=200), cancel()))
    assert service.outcomes == {"cancelled": 1}


def test_what_has_its_pictures_cannot_be_cancelled(service: Service) -> None:
    async def run() -> None:
        generation = await service.admit(request(), "one")
        await service.pictures(generation)
        with pytest.raises(UnknownGeneration):
            service.cancel("one")
        service.release(generation)

    asyncio.run(run())
    assert service.outcomes == {"completed": 1}


def test_what_is_drawn_needs_no_engine_that_works(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        generation = await service.admit(request(), "one")
        while not generation.done:
            await generation.news()
        monkeypatch.setattr(engine, "failure", RuntimeError())
        service.abandon()
        await service.pictures(generation)
        service.release(generation)

    asyncio.run(run())
    assert service.outcomes == {"completed": 1}


def test_a_cancellation_while_pictures_are_encoded_is_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., bytes] = pictures.encode

    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def cancel() -> None:
            service.cancel("one")

        def cancelling(*arguments: Any) -> bytes:
            asyncio.run_coroutine_threadsafe(cancel(), loop).result(60)
            return real(*arguments)

        monkeypatch.setattr(pictures, "encode", cancelling)
        generation = await service.admit(request(), "one")
        with pytest.raises(Cancelled):
            await service.pictures(generation)
        service.release(generation)

    asyncio.run(run())
    assert service.outcomes == {"cancelled": 1}


def test_a_cancellation_during_admission_outweighs_a_refusal(service: Service) -> None:
    async def cancel() -> None:
        await asyncio.sleep(0)
        service.cancel("one")

    assert not asyncio.run(answered(service, request(spacing="custom"), cancel()))
    assert service.outcomes == {"cancelled": 1}


def test_in_no_interleaving_do_both_win(service: Service) -> None:
    began = time.perf_counter()
    asyncio.run(answered(service, request(), asyncio.sleep(0)))
    once = time.perf_counter() - began
    service.outcomes.clear()
    for k in range(60):
        told: list[bool] = []

        async def cancel(after: float, told: list[bool]) -> None:
            await asyncio.sleep(after)
            try:
                service.cancel("one")
            except UnknownGeneration:
                told.append(False)
            else:
                told.append(True)

        posted = asyncio.run(answered(service, request(), cancel(once * 1.5 * k / 60, told)))
        assert told == [not posted]
    assert sum(service.outcomes.values()) == 60
