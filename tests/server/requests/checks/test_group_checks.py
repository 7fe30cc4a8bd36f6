"""Which requests make their images one group, and the errors for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guidance import FeynmanKac
from server.engine.task import ImageTask
from server.errors import InvalidRequest
from server.requests.resolve import Prepared, make_plan, prepare, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.toy_model import SCHEDULE, Toy

SDE = {"name": "ddim", "eta": 1.0}


def resolved(
    guidance: dict[str, Any], *, n: int = 3, has_picture: bool = False, **fields: Any
) -> ResolvedRequest:
    """The request after `resolve`; `reference` may be any text, as it is decoded elsewhere."""
    request = GenerateRequest.model_validate(
        {
            "prompt": "x",
            "steps": 6,
            "n": n,
            "sampler": SDE,
            "guidance": {"name": "cfg", **guidance},
            **fields,
        }
    )
    return resolve(request, Toy(), Limits(), (32, 32) if has_picture else None)


def prepared(request: ResolvedRequest) -> Prepared:
    layout = request.sampler, request.spacing, request.steps, request.strength
    return prepare(request, Toy(), make_plan(SCHEDULE, *layout))


def tasks(request: ResolvedRequest) -> list[ImageTask]:
    return tasks_of(prepared(request), Toy())


@pytest.mark.parametrize(
    "guidance",
    [{"particles": "fkc", "skip_tuning": {}}, {"negtome": {"strength": 0.5}, "perturbed": ["pag"]}],
    ids=["particles", "images apart"],
)
def test_images_that_depend_on_each_other_are_one_group(guidance: dict[str, Any]) -> None:
    made = tasks(resolved(guidance))
    assert made[0].group is not None
    assert all(one.group is made[0].group for one in made)
    assert len(made[0].terms) == 2


def test_other_images_are_by_themselves() -> None:
    assert [one.group for one in tasks(resolved({}))] == [None] * 3


def test_what_was_asked_comes_back_in_the_settings() -> None:
    settings = resolved({"particles": {"name": "fkc", "bound": 1e6}}).settings()
    again = GenerateRequest.model_validate(settings)
    assert again.guidance is not None
    assert again.guidance.particles == FeynmanKac(bound=1e6)
    assert again.n == 3


@pytest.mark.parametrize(
    ("guidance", "fields", "field", "sentence"),
    [
        (
            {"particles": "fkc"},
            {"n": 1},
            "n",
            "n is 1; guidance.particles needs at least 2 images.",
        ),
        (
            {"negtome": {}},
            {"n": 1},
            "n",
            "n is 1; guidance.negtome needs at least 2 images, or an image in `reference`.",
        ),
        (
            {},
            {"reference": "sent"},
            "reference",
            "reference has no effect without guidance.negtome; add that or leave reference out.",
        ),
        (
            {"negtome": {"away_from": "first"}},
            {"reference": "sent"},
            "reference",
            "reference has no effect while guidance.negtome.away_from is 'first'; leave one out.",
        ),
        (
            {"negtome": {"away_from": "reference"}},
            {},
            "guidance.negtome.away_from",
            "guidance.negtome.away_from is 'reference', which needs an image; send `reference`.",
        ),
        (
            {"particles": "fkc", "negtome": {}},
            {"reference": "sent"},
            "guidance.particles",
            "guidance.particles is 'fkc'; its weights hold for 'cfg' alone, so leave "
            "guidance.negtome out.",
        ),
        (
            {"negtome": {"layers": ["none"]}},
            {"reference": "sent", "n": 1},
            "guidance.negtome",
            "guidance.negtome: model 'toy' has no layer 'none'; it has middle.",
        ),
        (
            {"particles": "fkc", "name": "apg"},
            {},
            "guidance.particles",
            "guidance.particles is 'fkc'; it corrects the rule 'cfg' and is incompatible with "
            "'apg'.",
        ),
        (
            {"particles": "fkc", "scale": 1},
            {},
            "guidance.particles",
            "guidance.particles is 'fkc'; at scale 1 there is no guidance to correct; choose "
            "another scale or leave it out.",
        ),
        (
            {"particles": "fkc", "policy": "reuse"},
            {},
            "guidance.particles",
            "guidance.particles is 'fkc'; it needs guidance at every step, so the policy 'reuse' "
            "is incompatible; leave guidance.policy out.",
        ),
        (
            {"particles": "fkc", "perturbed": ["pag"]},
            {},
            "guidance.particles",
            "guidance.particles is 'fkc'; its weights hold for 'cfg' alone, so leave "
            "guidance.perturbed out.",
        ),
        (
            {"particles": "fkc", "negtome": {}},
            {},
            "guidance.particles",
            "guidance.particles is 'fkc'; its weights hold for 'cfg' alone, so leave "
            "guidance.negtome out.",
        ),
        (
            {"particles": "fkc"},
            {"has_picture": True},
            "guidance.particles",
            "guidance.particles is 'fkc'; particles need a run from pure noise, so leave `image` "
            "out.",
        ),
        (
            {"negtome": {}, "policy": "adaptive"},
            {},
            "guidance.negtome",
            "guidance.negtome: the policy 'adaptive' ends guidance for each image independently, "
            "but these images need each other's predictions; choose another policy, or send an "
            "image in `reference`.",
        ),
        (
            {"negtome": {"layers": ["none"]}},
            {},
            "guidance.negtome",
            "guidance.negtome: model 'toy' has no layer 'none'; it has middle.",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    guidance: dict[str, Any], fields: dict[str, Any], field: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolved(guidance, **fields)
    assert caught.value.field == field
    assert caught.value.message == sentence


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("policy", ["always", "adaptive"])
def test_images_that_avoid_a_picture_are_no_group(n: int, policy: str) -> None:
    asked = resolved({"negtome": {"stop": 0.6}, "policy": policy}, n=n, reference="sent")
    reference = torch.zeros(3, 32, 32)
    made = tasks_of(prepared(asked), Toy(), reference=reference)
    assert [one.group for one in made] == [None] * n
    [shared] = {one.terms for one in made}
    [term] = shared
    assert term.picture is reference
    assert [term.acts(stage) for stage in range(6)] == [k / 6 < 0.6 for k in range(6)]


def test_settings_of_images_that_avoid_a_picture_are_refused_without_it() -> None:
    settings = resolved({"negtome": {}}, n=2, reference="sent").settings()
    assert "reference" not in settings
    again = GenerateRequest.model_validate(settings)
    with pytest.raises(InvalidRequest, match="which needs an image; send `reference`") as caught:
        resolve(again, Toy(), Limits(), None)
    assert caught.value.field == "guidance.negtome.away_from"


@pytest.mark.parametrize("sampler", ["dpm_solver_pp", {"name": "ddim", "eta": 0.5}, "lcm"])
def test_particles_need_the_noise_of_the_reverse_diffusion(sampler: Any) -> None:
    with pytest.raises(InvalidRequest, match="allowed are: 'ddim' with eta 1") as caught:
        tasks(resolved({"particles": "fkc"}, sampler=sampler))
    assert caught.value.field == "sampler"


@pytest.mark.parametrize(
    "sampler",
    [
        SDE,
        "euler_ancestral",
        {"name": "dpm_solver_pp", "variant": "sde"},
        {"name": "sa_solver", "tau": 1.0},
    ],
)
def test_the_samplers_that_the_refusal_names_are_taken(sampler: Any) -> None:
    assert tasks(resolved({"particles": "fkc"}, sampler=sampler))[0].group is not None


@pytest.mark.parametrize("fields", [{}, {"reference": "sent"}], ids=["first", "reference"])
def test_a_window_without_a_step_is_refused(fields: dict[str, Any]) -> None:
    asked = resolved({"negtome": {"start": 0.05, "stop": 0.1}}, **fields)
    with pytest.raises(
        InvalidRequest, match="none of the 6 steps lies within its window"
    ) as caught:
        prepared(asked)
    assert caught.value.field == "guidance.negtome"
