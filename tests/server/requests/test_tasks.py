"""What a resolved request hands to the engine."""

from __future__ import annotations

import numpy as np

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
    plan = make_plan(model.facts.schedule, resolved.sampler, resolved.spacing, 8, None)
    [task] = tasks_of(prepare(resolved, model, plan), model)
    assert task.strengths is not None
    timesteps = plan.t[:-1]
    np.testing.assert_allclose(task.strengths[0], np.maximum(0, 2 - 0.003 * (1000 - timesteps)))
    assert (task.strengths[1] == 2.8).all()
    plain = request.model_copy(update={"guidance": None})
    [task] = tasks_of(prepare(resolve(plain, model, Limits(), None), model, plan), model)
    assert task.strengths is None
