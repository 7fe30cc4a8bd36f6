"""What a resolved request hands to the engine."""

from __future__ import annotations

import numpy as np

from server.engine.terms.perturbation import Disturbed
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
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
    assert isinstance(falling, Disturbed)
    assert isinstance(constant, Disturbed)
    timesteps = plan.t[:-1]
    np.testing.assert_allclose(falling.strengths, np.maximum(0, 2 - 0.003 * (1000 - timesteps)))
    assert {*constant.strengths} <= {0.0, 2.8}
    plain = request.model_copy(update={"guidance": None})
    [task] = tasks_of(prepare(resolve(plain, model, Limits(), None), model, plan), model)
    assert task.terms == ()
