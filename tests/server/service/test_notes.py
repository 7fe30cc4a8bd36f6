"""What was chosen for a distilled model reaches the client, at once and with the images."""

from __future__ import annotations

import asyncio

from server.http.native.answers import completed, queued
from server.models.conventions import defaults_by
from server.requests.schema import GenerateRequest
from server.service.service import Service
from server.settings import Limits
from tests.server.toy_model import Toy, started


def test_the_answer_and_the_first_event_say_what_was_chosen() -> None:
    model = Toy(embeds_scale=False, defaults=defaults_by("tcd", "its name says so"))
    engine = started(model, 4)
    service = Service(Limits())
    service.open(engine, {"toy": model})

    async def notes(body: GenerateRequest) -> tuple[list[str], list[str]]:
        generation = await service.admit(body, "it")
        try:
            pictures = await service.pictures(generation)
            return queued(generation).notes, completed(generation, pictures).notes
        finally:
            service.release(generation)

    try:
        said = (
            "Chosen for model 'toy', which is sampled by the convention 'tcd' because its name "
            "says so: sampler 'tcd', spacing 'lcm', guidance 'none'."
        )
        assert asyncio.run(notes(GenerateRequest(prompt="a", steps=2))) == ([said], [said])
    finally:
        engine.stop(0)
