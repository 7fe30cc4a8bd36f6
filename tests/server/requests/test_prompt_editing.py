"""Requests with prompts that change, in each of their runs and for each model."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.task import ImageTask
from server.errors import InvalidRequest
from server.models.prompt_editing import MAX_TEXTS, EditedPrompt, Timeline
from server.requests.prompt_editing import timelines_of
from server.requests.resolve import Prepared, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.tasks import tasks_of
from server.service.planner import Planner
from server.settings import Limits
from tests.server.toy_model import Toy


class Weighing(Toy):
    """A toy that reads the syntax."""

    weighs_prompts = True


MODEL = Weighing()
EDITING: dict[str, Any] = {"prompt_syntax": "automatic1111", "sampler": "euler", "steps": 10}


def resolved(size: tuple[int, int] | None = None, **fields: Any) -> ResolvedRequest:
    body = {"prompt": "a [b:c:.5]", **EDITING, **fields}
    return resolve(GenerateRequest.model_validate(body), MODEL, Limits(), size)


def prepared(**fields: Any) -> Prepared:
    body = {"prompt": "a [b:c:.5]", **EDITING, **fields}
    return Planner(Limits()).prepare(GenerateRequest.model_validate(body), MODEL, None)[0]


def told(task: ImageTask) -> list[str]:
    """The prompt at each evaluation."""
    assert isinstance(task.prompt, EditedPrompt)
    prompt = task.prompt
    return [str(prompt.texts[prompt.number(at)]) for at in range(task.plan.evaluations)]


def test_times_are_shares_of_all_evaluations_of_a_run() -> None:
    """`heun` has twice the steps; from an image, those of the whole run count, as there."""
    assert timelines_of(resolved()) == timelines_of(resolved(sampler="dpm_fast")) == (Timeline(10),)
    assert timelines_of(resolved(sampler="heun")) == (Timeline(20),)
    image = {"strength": 0.5, "width": 32, "height": 32}
    assert timelines_of(resolved((32, 32), **image)) == (Timeline(10),)


def test_the_second_run_goes_on_from_where_the_first_one_ended() -> None:
    fields = {"prompt": "[a:b:.5] [c:d:1.5]", "hires": {"steps": 16, "strength": 0.5}}
    first = prepared(**fields)
    second = first.second
    assert second is not None
    assert (first.timeline, second.timeline) == (Timeline(10), Timeline(8, before=10))
    [task], [again] = tasks_of(first, MODEL), tasks_of(second, MODEL)
    assert told(task) == ["a c"] * 6 + ["b c"] * 4
    assert told(again) == ["b c"] * 5 + ["b d"] * 3


def test_every_prompt_of_a_request_may_change() -> None:
    rule = {"name": "composed", "scale": 3, "prompts": [{"prompt": "[x:y:2]", "weight": 2}]}
    [task] = tasks_of(prepared(negative_prompt="[u|v]", guidance=rule), MODEL)
    assert isinstance(task.negative_prompt, EditedPrompt)
    [own] = [branch.prompt for branch in task.rule.branches if branch.told == "own"]
    assert isinstance(own, EditedPrompt)
    assert list(map(str, own.texts)) == ["x", "y"]
    plain = prepared(prompt_syntax=None)
    assert [type(task.prompt) for task in tasks_of(plain, MODEL)] == [str]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        (
            {"prompt": "[" + "|".join(map(str, range(9))) + "][a|b|c|d|e|f|g|h]", "steps": 200},
            "prompt",
            f"at most {MAX_TEXTS} different texts",
        ),
        ({"prompt": "[a:" + "b " * 200 + ":.5]"}, "prompt", "has 200 tokens"),
        (
            {"prompt": "[a:" + "b " * 200 + ":1.5]", "hires": {}},
            "prompt",
            "has 200 tokens",
        ),
    ],
    ids=["too many texts", "a later text is too long", "one of the second run is too long"],
)
def test_what_a_prompt_may_not_change_to_is_refused(
    fields: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        resolved(**fields)
    assert refused.value.field == field
