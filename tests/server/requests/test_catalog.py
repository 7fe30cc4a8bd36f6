from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from guidance import CFG, PARTS, RULES, STEP_CACHES, Part
from guidance.embedded import Embedded
from samplers import LCM, SAMPLERS, SPACINGS, LCMSpacing
from server.models.defaults import ModelDefaults
from server.requests.catalog import catalog, defaults_of
from server.requests.hires import Hires
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest, split
from server.settings import Limits
from tests.server.toy_model import Toy

LISTS: dict[str, tuple[type[BaseModel], ...]] = {
    "samplers": SAMPLERS,
    "spacings": SPACINGS,
    "rules": RULES,
    **{part.plural: part.kinds for part in PARTS},
    "caches": STEP_CACHES,
}


def _beside_a_rule(part: Part) -> Callable[[Any], dict[str, Any]]:
    return lambda one: {"guidance": {"name": "cfg", part.field: [one] if part.many else one}}


FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "samplers": lambda one: {"sampler": one},
    "spacings": lambda one: {"spacing": one},
    "rules": lambda one: {"guidance": one},
    **{part.plural: _beside_a_rule(part) for part in PARTS},
    "caches": lambda one: {"cache": one},
}
"""Fields of a request that choose an entry, for each list."""

ENTRIES = [(title, entry) for title in LISTS for entry in getattr(catalog(), title)]


def test_the_catalog_is_the_registry() -> None:
    for title, members in LISTS.items():
        entries = getattr(catalog(), title)
        defaults = [member().model_dump(mode="json") for member in members]
        assert [entry.defaults for entry in entries] == defaults
        assert [entry.name for entry in entries] == [one.get("name", title) for one in defaults]


def test_a_form_finds_every_list_and_where_its_choice_goes() -> None:
    choices = catalog().choices
    assert [choice.entries for choice in choices] == [*LISTS]
    assert {choice.field for choice in choices if choice.most > 1} == {"guidance.perturbed"}
    assert [choice.field for choice in choices if choice.blank is None] == [
        "sampler",
        "guidance",
        "guidance.policy",
    ]
    for choice in choices:
        body: Any = FIELDS[choice.entries]("chosen")
        for part in choice.field.split("."):
            body = body[part]
        assert body == (["chosen"] if choice.most > 1 else "chosen")


def test_every_entry_explains_itself() -> None:
    for title, entry in ENTRIES:
        where = f"{title}, {entry.name}"
        assert entry.summary, where
        assert entry.source, where
        assert set(entry.parameters["properties"]) == set(entry.defaults), where
        for name, parameter in entry.parameters["properties"].items():
            assert "default" in parameter, f"{where}: {name}"
            assert name == "name" or parameter["description"], f"{where}: {name}"


def test_every_sampler_says_its_order_cost_and_spacing() -> None:
    said = {"convergence_order", "default_spacing", "evaluations_per_step", "stochastic"}
    for entry in catalog().samplers:
        assert set(entry.properties) >= said, entry.name


def test_what_the_catalog_gives_is_a_request() -> None:
    def understood(title: str, one: Any) -> dict[str, Any]:
        body = {"prompt": "a red circle"} | FIELDS[title](one)
        return GenerateRequest.model_validate(body).model_dump(mode="json")

    for title, entry in ENTRIES:
        full = understood(title, entry.defaults)
        assert _contains(full, FIELDS[title](entry.defaults)), f"{title}, {entry.name}"
        short = entry.name if "name" in entry.defaults else {}
        assert understood(title, short) == full, f"{title}, {entry.name}"


def _contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return all(_contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(_contains, whole, part))
    return whole == part


@pytest.mark.parametrize("sampler", [None, "ddim", "dpm_solver_v3"])
def test_the_catalog_says_what_is_left_out_of_a_request(
    generate: Callable[..., httpx2.Response], client: httpx2.Client, sampler: str | None
) -> None:
    defaults = client.get("/v1/catalog").json()["defaults"]
    asked = {} if sampler is None else {"sampler": sampler}
    settings = generate(**asked).json()["settings"]
    guidance = defaults["guidance_by_sampler"].get(sampler, defaults["guidance"])
    assert settings["guidance"] == {key: one for key, one in guidance.items() if one is not None}
    assert settings["n"] == defaults["n"]
    assert sampler or settings["sampler"] == defaults["sampler"]


def test_the_catalog_says_how_many_steps_there_are_by_default(client: httpx2.Client) -> None:
    steps = client.get("/v1/catalog").json()["defaults"]["steps"]
    body = {"prompt": "a red circle", "guidance": "none", "width": 64, "height": 64}
    answer = client.post("/v1/generate", json=body).json()
    assert answer["settings"]["steps"] == answer["evaluations"]["spent"] == steps == 25


def test_the_catalog_names_the_models(client: httpx2.Client) -> None:
    answer = client.get("/v1/catalog").json()
    bare = {"upscalers", "mask_contents"}
    assert set(answer) == {*LISTS, *bare, "choices", "defaults", "models"}
    assert [model["name"] for model in answer["models"]] == ["embedded", "embedded-lcm"]
    for model in answer["models"]:
        assert model["width"] % model["size_multiple"] == 0
        assert int(model["revision"], 16)


def test_a_model_without_defaults_of_its_own_has_those_of_all(client: httpx2.Client) -> None:
    answer = client.get("/v1/catalog").json()
    assert answer["models"][0]["defaults"] == answer["defaults"]
    assert answer["defaults"]["spacing"] is None


def test_the_catalog_says_the_defaults_of_a_model_that_has_its_own() -> None:
    own = ModelDefaults(
        sampler=LCM(),
        spacing=LCMSpacing(distilled_steps=40),
        steps=4,
        rule=CFG(scale=8.5),
        policy=Embedded(),
        convention="lcm",
        reason="the test says so",
    )
    said = defaults_of(own)
    body = {"prompt": "x", "sampler": said.sampler, "spacing": said.spacing}
    named = GenerateRequest.model_validate({**body, "steps": said.steps, "guidance": said.guidance})
    silent = GenerateRequest(prompt="x")
    model = Toy(defaults=own)
    given, filled = (resolve(one, model, Limits(), None) for one in (named, silent))
    assert given.model_copy(update={"seed": filled.seed}) == filled
    assert (filled.sampler, filled.spacing, filled.steps) == (own.sampler, own.spacing, own.steps)
    assert split(filled.guidance) == (own.rule, own.policy)
    assert not said.guidance_by_sampler


def test_the_catalog_is_there_before_the_models(unloaded: Callable[..., httpx2.Client]) -> None:
    answer = unloaded().get("/v1/catalog")
    assert answer.status_code == 200
    assert answer.json()["models"] == []


def test_what_a_field_takes_by_name_alone_is_listed_too() -> None:
    listed = catalog()
    for upscaler in listed.upscalers:
        Hires(upscaler=upscaler)
    for content in listed.mask_contents:
        GenerateRequest(prompt="x", mask_content=content)
    assert (listed.upscalers[0], listed.mask_contents[0]) == ("lanczos", "original")
