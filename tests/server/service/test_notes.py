"""Clients are told what was chosen for a distilled model, at once and with the images."""

from __future__ import annotations

import asyncio

import torch

from server.http.native.answers import completed, queued
from server.models.conventions import defaults_by
from server.requests.schema import GenerateRequest
from server.service.planner import Planner
from server.service.service import Service
from server.settings import Limits
from tests.server.toy_model import Toy, started


def test_what_the_second_run_alone_is_warned_of_is_said() -> None:
    model = Toy(embeds_scale=False, defaults=defaults_by("lcm_lora", ""))
    planner = Planner(Limits())

    def warnings(steps: int, hires: dict[str, int]) -> tuple[str, ...]:
        body = GenerateRequest.model_validate({"prompt": "a", "steps": steps, "hires": hires})
        return planner.prepare(body, model, None)[0].warnings

    said = "steps is 25; use 1 to 8, which model 'toy' was distilled for."
    assert warnings(4, {}) == ()
    assert warnings(4, {"steps": 25}) == (f"In the second run, {said}",)
    assert warnings(25, {}) == (said,)


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


def test_the_type_that_the_model_computes_in_is_in_the_text_of_its_images() -> None:
    model = Toy()
    engine = started(model, 4)
    model.dtype = torch.bfloat16
    service = Service(Limits())
    service.open(engine, {"toy": model})

    async def text() -> str:
        generation = await service.admit(GenerateRequest(prompt="a", steps=2), "it")
        try:
            return (await service.pictures(generation)).pictures[0].text
        finally:
            service.release(generation)

    try:
        assert "Dtype: bfloat16" in asyncio.run(text())
    finally:
        service.close()
        engine.stop(0)
