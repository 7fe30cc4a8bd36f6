"""What a resolved request passes to the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.engine.terms.perturbation import PerturbationTerm
from server.errors import InvalidRequest
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.start_noise import MAX_SEED
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.toy_model import Toy


def test_an_adaptive_perturbation_weakens_with_the_timesteps_of_the_run() -> None:
    model = Toy()
    request = GenerateRequest.model_validate(
        {
            "prompt": "x",
            "steps": 8,
            "guidance": {
                "name": "cfg",
                "perturbed": [{"name": "pag", "scale": 2, "adaptive_scale": 0.003}, "slg"],
            },
        }
    )
    resolved = resolve(request, model, Limits(), None)
    plan = make_plan(model.default_schedule, resolved.sampler, resolved.spacing, 8, None)
    [task] = tasks_of(prepare(resolved, model, plan), model)
    falling, constant = task.terms
    assert isinstance(falling, PerturbationTerm)
    assert isinstance(constant, PerturbationTerm)
    timesteps = plan.t[:-1]
    np.testing.assert_allclose(falling.strengths, np.maximum(0, 2 - 0.003 * (1000 - timesteps)))
    assert {*constant.strengths} <= {0.0, 2.8}
    plain = request.model_copy(update={"guidance": None})
    [task] = tasks_of(prepare(resolve(plain, model, Limits(), None), model, plan), model)
    assert task.terms == ()


def test_variations_keep_the_seed_and_count_their_own() -> None:
    body = {"prompt": "x", "steps": 2, "n": 2, "seed": 7, "variation": {"strength": 0.5}}
    resolved = resolve(GenerateRequest.model_validate(body), Toy(), Limits(), None)
    assert resolved.variation is not None
    first = resolved.variation.seed
    assert first is not None
    plan = make_plan(Toy().default_schedule, resolved.sampler, resolved.spacing, 2, None)
    tasks = tasks_of(prepare(resolved, Toy(), plan), Toy())
    assert [task.seed for task in tasks] == [7, 7]
    assert [task.variation for task in tasks] == [(first, 0.5), (first + 1, 0.5)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"variation": {"strength": 0.5, "seed": MAX_SEED}}, "variation.seed"),
        ({"noise_size": {"width": 64, "height": 60}}, "noise_size.height"),
        ({"mask_content": "fill"}, "mask_content"),
        ({"noise_size": {"width": 16384, "height": 16384}}, "noise_size.width"),
        (
            {"variation": {"strength": 0.5}, "guidance": {"name": "cfg", "particles": "fkc"}},
            "guidance.particles",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(fields: dict[str, Any], param: str) -> None:
    request = GenerateRequest.model_validate({"prompt": "x", "n": 2} | fields)
    with pytest.raises(InvalidRequest) as refused:
        resolve(request, Toy(), Limits(), None)
    assert refused.value.field == param
