"""What tests of families ask a model for, and how they compare latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits


def task_of(model: HostedModel, **fields: Any) -> ImageTask:
    """The task of a request of one image, whose fields are those of a JSON body."""
    request = GenerateRequest.model_validate(fields)
    resolved = resolve(request, model, Limits(), None)
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    [task] = tasks_of(prepare(resolved, model, make_plan(schedule, *layout)), model)
    return task


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_among(seen: list[Tensor], expected: Tensor) -> None:
    errors = [difference(one, expected) for one in seen if one.shape == expected.shape]
    assert min(errors) < 1e-4, errors


def assert_apart(ours: Tensor, sprung: Tensor) -> None:
    """A trap must be visible, or a test that avoids it shows nothing."""
    assert difference(sprung, ours) > 1e-2
