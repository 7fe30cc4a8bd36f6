"""A model whose noise schedule depends on the size gets a plan for each size."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from torch import Tensor

from samplers import NoiseSchedule
from server.models.inputs import RowInputs
from server.requests.schema import GenerateRequest
from server.service.service import Service
from server.settings import Limits
from tests.server.toy_model import Toy, started

STEPS = 3


class Shifting(Toy):
    """A flow whose shift is a cell's worth for each cell along the width, as FLUX's grows."""

    def __init__(self) -> None:
        super().__init__(prediction="flow")
        self.times: list[float] = []

    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        return NoiseSchedule.flow(shift=width / 8)

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        self.times.append(float(t[0]))
        return super().evaluate(x, t, inputs)


def test_each_size_runs_on_the_schedule_that_the_model_gives_it() -> None:
    model = Shifting()
    engine = started(model, 4)
    service = Service(Limits())
    service.open(engine, {"toy": model})

    async def times_of(width: int) -> list[float]:
        model.times.clear()
        body: dict[str, Any] = {"prompt": "a", "width": width, "height": 32, "steps": STEPS}
        body |= {"sampler": "euler", "spacing": "linspace", "guidance": "none"}
        generation = await service.admit(GenerateRequest.model_validate(body), str(width))
        await service.pictures(generation)
        service.release(generation)
        return list(model.times)

    for width in (32, 64, 32):
        grid = NoiseSchedule.flow(shift=width / 8).grid("linspace", STEPS)
        expected = (1000 * grid.t[:-1]).tolist()
        assert asyncio.run(times_of(width)) == pytest.approx(expected, rel=1e-5)
    engine.stop(0)
