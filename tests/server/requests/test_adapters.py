"""The field `adapters` of a request, and what an adapter changes about its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from server.errors import InvalidRequest
from server.models.adapters.adapter import Adapter
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.hosted import HostedModel
from server.models.weight_memory import WeightMemory
from server.requests.catalog import adapter_entries, defaults_of
from server.requests.ineffective import warnings_for
from server.requests.messages import explain
from server.requests.resolve import make_plan, prepare, resolve, statistics_for
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes
from tests.server.toy_model import Toy

NETWORK = nn.ModuleDict({"mid": nn.Linear(6, 5)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    """A model with two style adapters, and one adapter for few steps."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, metadata in (("pastel", {}), ("ink", {}), ("quick", {"weft.convention": "lcm_lora"})):
        tensors, _ = files.peft({"unet": changes(NETWORK, 2)})
        files.saved((tensors, metadata), folder / f"{name}.safetensors")
    toy = Toy(embeds_scale=False)
    target, memory = Target.of("toy", {"unet": NETWORK}), WeightMemory[Adapter](2**20, "adapters")
    toy.adapters = AdapterShelf([folder], target, memory, torch.device("cpu"), torch.float32)
    return toy


def resolved(model: HostedModel, adapters: Any = (), **fields: Any) -> ResolvedRequest:
    body = {"prompt": "x", "seed": 5, "adapters": adapters, **fields}
    return resolve(GenerateRequest.model_validate(body), model, Limits(), None)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ([], []),
        ("pastel", [("pastel", 1.0)]),
        (["pastel", {"name": "ink", "weight": -0.5}], [("pastel", 1.0), ("ink", -0.5)]),
        ([{"name": "ink"}], [("ink", 1.0)]),
    ],
)
def test_adapters_are_names_or_objects(
    model: HostedModel, written: Any, means: list[tuple[str, float]]
) -> None:
    request = resolved(model, written)
    settings = request.settings()
    assert [(one["name"], one["weight"]) for one in settings["adapters"]] == means
    assert GenerateRequest.model_validate(settings).adapters == request.adapters


def test_the_schema_takes_both_forms() -> None:
    field = GenerateRequest.model_json_schema()["properties"]["adapters"]
    bare, many = field["anyOf"]
    assert bare["type"] == "string"
    assert (many["type"], many["maxItems"]) == ("array", 8)
    assert [one["type"] for one in many["items"]["anyOf"]] == ["string", "object"]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            [{"name": "ink", "weight": 5}],
            "adapters.0.weight is 5; it must be at most 4.",
        ),
        (["ink"] * 9, "adapters has 9 entries; it must have at most 8."),
        ({"name": "ink"}, "adapters is an object; it must be a list."),
        ([7], "adapters.0 is 7; it must be an object."),
        (
            [{"name": "ink", "wight": 1}],
            "adapters.0.wight is not a known field (did you mean weight?); allowed are: name, "
            "weight.",
        ),
    ],
)
def test_what_is_no_list_of_adapters_is_refused(written: Any, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        GenerateRequest.model_validate({"prompt": "x", "adapters": written})
    assert explain(refused.value.errors(), GenerateRequest).message == says


@pytest.mark.parametrize(
    ("written", "field", "says"),
    [
        (
            ["ink", "attic"],
            "adapters.1.name",
            "adapters.1.name: 'attic' is not among the adapters of model 'toy'; these are: ink, "
            "pastel, quick.",
        ),
        (["ink", "ink"], "adapters.1.name", "adapters.1.name is 'ink', which is named twice."),
    ],
)
def test_an_adapter_must_be_one_of_the_model(
    model: HostedModel, written: list[str], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved(model, written)
    assert (refused.value.field, refused.value.message) == (field, says)


def test_a_model_without_adapters_says_that_it_has_none() -> None:
    with pytest.raises(
        InvalidRequest, match="not among the adapters of model 'toy'; these are: none"
    ):
        resolved(Toy(), "pastel")


def test_the_images_of_a_request_have_its_adapters_but_those_of_weight_0(
    model: HostedModel,
) -> None:
    request = resolved(model, [{"name": "ink", "weight": 0}, {"name": "pastel"}], n=2)
    layout = request.sampler, request.spacing, request.steps, request.strength
    plan = make_plan(model.default_schedule, *layout)
    for task in tasks_of(prepare(request, model, plan), model):
        [one] = task.adapters
        assert (one.adapter.name, one.weight) == ("pastel", 1.0)


def test_an_adapter_for_few_steps_brings_its_defaults(model: HostedModel) -> None:
    settings = resolved(model, ["quick", "pastel"]).settings()
    assert (settings["sampler"]["name"], settings["spacing"]["name"]) == ("lcm", "lcm")
    assert (settings["steps"], settings["guidance"]["name"]) == (4, "none")
    assert resolved(model, "pastel").settings()["steps"] == 25
    off = [{"name": "quick", "weight": 0}]
    assert resolved(model, off).settings()["steps"] == 25
    named = resolved(model, "quick", steps=8, guidance="cfg").settings()
    assert (named["sampler"]["name"], named["steps"]) == ("lcm", 8)
    assert named["guidance"]["name"] == "cfg"


def test_the_catalog_lists_the_adapters_of_a_model(model: HostedModel) -> None:
    ink, pastel, quick = adapter_entries(model)
    assert (pastel.name, pastel.rank, pastel.changes) == ("pastel", 2, ("unet",))
    assert ink.defaults is pastel.defaults is None
    assert quick.defaults is not None
    assert quick.defaults.steps == 4
    assert quick.defaults != defaults_of(None)


def warnings(model: HostedModel, adapters: Any, **fields: Any) -> tuple[str, ...]:
    request = resolved(model, adapters, **fields)
    layout = request.sampler, request.spacing, request.steps, request.strength
    return warnings_for(request, model, make_plan(model.default_schedule, *layout))


def test_what_is_fitted_to_the_model_alone_is_said(model: HostedModel) -> None:
    """Checked with a policy whose coefficients need not be fitted here."""
    guidance = {"name": "cfg", "policy": "linear_adaptive"}
    [said] = warnings(model, "pastel", guidance=guidance)
    assert said.startswith("guidance.policy 'linear_adaptive' is fitted to model 'toy' without")
    assert warnings(model, [{"name": "pastel", "weight": 0}], guidance=guidance) == ()


def test_an_adapter_for_few_steps_is_asked_for_no_more_and_for_one_prediction(
    model: HostedModel,
) -> None:
    steps, guidance = warnings(model, "quick", steps=25, guidance="cfg")
    assert "use 1 to 8, which model 'toy' with these adapters was distilled for." in steps
    assert "model 'toy' with these adapters was distilled to be sampled from one" in guidance
    assert '"nag": {}' in guidance


def test_statistics_of_the_model_alone_serve_no_adapter(model: HostedModel) -> None:
    exact = {"name": "dpm_solver_v3", "statistics": "exact"}
    request = resolved(model, "pastel", sampler=exact, guidance="none")
    with pytest.raises(InvalidRequest, match="a request with `adapters`"):
        statistics_for(request, model)


def test_those_that_never_fit_together_are_refused_for_good(tmp_path: Path) -> None:
    for name in ("pastel", "ink"):
        files.saved(files.peft({"unet": changes(NETWORK, 2)}), tmp_path / f"{name}.safetensors")
    toy = Toy(embeds_scale=False)
    target, cpu = Target.of("toy", {"unet": NETWORK}), torch.device("cpu")
    [one, _] = AdapterShelf(
        [tmp_path], target, WeightMemory[Adapter](2**20, ""), cpu, torch.float32
    ).available()
    nbytes = one.nbytes(torch.float32)
    memory = WeightMemory[Adapter](2 * nbytes - 1, "adapters")
    toy.adapters = AdapterShelf([tmp_path], target, memory, cpu, torch.float32)
    with pytest.raises(InvalidRequest) as refused:
        resolved(toy, ["pastel", "ink"])
    assert refused.value.field == "adapters"
    assert refused.value.message == (
        f"adapters: the adapters of this request take {2 * nbytes} bytes of memory together; at "
        f"most {2 * nbytes - 1} are allowed."
    )
    resolved(toy, ["pastel", {"name": "ink", "weight": 0}])
