"""The field `controls` of a request: what it may hold, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from server.errors import InvalidRequest
from server.models.controls.control import Control
from server.models.controls.shelf import ControlShelf
from server.models.hosted import HostedModel
from server.models.weight_memory import WeightMemory
from server.requests.catalog import control_entries
from server.requests.chosen import notes_for
from server.requests.controls import load_controls
from server.requests.infotext import infotext
from server.requests.messages import explain
from server.requests.reading import Reading
from server.requests.resolve import make_plan, prepare, resolve, statistics_for
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.upload import put_upload, uploads_in, without_uploads
from server.settings import Limits
from tests.server.models.controls.tiny_controls import Plain, put_plain
from tests.server.toy_model import Toy

PICTURE = "aGVsbG8="


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    """A model with ControlNets for edges and depth."""
    folder = tmp_path_factory.mktemp("controls")
    for name in ("edges", "depth"):
        put_plain(folder, name)
    toy = Toy(embeds_scale=False)
    memory = WeightMemory[Control](2**20, "ControlNets")
    toy.controls = ControlShelf([folder], "toy", Plain(), memory, toy.device, toy.dtype)
    return toy


def written(*controls: dict[str, Any], **fields: Any) -> GenerateRequest:
    sent = [{"image": PICTURE, **one} for one in controls]
    return GenerateRequest.model_validate({"prompt": "x", "seed": 5, "controls": sent, **fields})


def resolved(model: HostedModel, *controls: dict[str, Any], **fields: Any) -> ResolvedRequest:
    return resolve(written(*controls, **fields), model, Limits(), None)


def test_settings_have_all_but_the_pictures(model: HostedModel) -> None:
    request = resolved(model, {"name": "edges"}, {"name": "depth", "scale": 0.5, "end": 0.8})
    settings = request.settings()
    assert settings["controls"] == [
        {"name": "edges", "scale": 1.0, "start": 0.0, "end": 1.0},
        {"name": "depth", "scale": 0.5, "start": 0.0, "end": 0.8},
    ]
    assert settings["resize_mode"] == "stretch"
    with pytest.raises(ValidationError) as refused:
        GenerateRequest.model_validate(settings)
    said = explain(refused.value.errors(), GenerateRequest)
    assert said.message == "controls.0.image is required."


def test_infotext_names_each_with_its_strength_and_window(model: HostedModel) -> None:
    edges = {"name": "edges", "scale": 0.5, "start": 0.1, "end": 0.8}
    depth = {"name": "depth", "resize_mode": "crop", "preprocessor": "invert"}
    request = resolved(model, edges, depth)
    text = infotext(request, model_revision="0", version="weft 1")
    inner = "Model: edges, Weight: 0.5, Guidance Start: 0.1, Guidance End: 0.8"
    assert f'ControlNet 0: "{inner}"' in text
    inner = "Model: depth, Weight: 1, Guidance Start: 0, Guidance End: 1"
    assert f'ControlNet 1: "Module: invert, {inner}, Resize Mode: Crop and Resize"' in text


def test_a_precedence_is_refused_where_the_controlnets_know_none(model: HostedModel) -> None:
    asked = written({"name": "edges", "precedence": "prompt"})
    with pytest.raises(InvalidRequest) as refused:
        resolve(asked, model, Limits(), None)
    assert refused.value.message == (
        "controls.0.precedence is 'prompt', but only models with a U-Net support it, and model "
        "'toy' has none; leave it out."
    )
    # What a client of AUTOMATIC1111 sends by default is left out, with a warning.
    habitual = asked.read_as(Reading(habitual=True))
    chosen = resolve(habitual, model, Limits(), None)
    assert chosen.controls[0].precedence is None
    [note] = notes_for(habitual, chosen, model)
    assert note == "precedence of ControlNets is ignored, as model 'toy' has no U-Net."


@pytest.mark.parametrize(
    ("control", "says"),
    [
        ({"name": "edges", "scale": 5}, "controls.0.scale is 5; it must be at most 4."),
        ({"name": "edges", "start": -0.1}, "controls.0.start is -0.1; it must be at least 0."),
        (
            {"name": "edges", "start": 0.5, "end": 0.5},
            "controls.0: start is 0.5; it must be less than end, 0.5.",
        ),
        ({"name": "edges", "image": 7}, "controls.0.image is 7; it must be a string."),
        (
            {"name": "edges", "weight": 1},
            "controls.0.weight is not a known field; allowed are: name, scale, start, end, "
            "resize_mode, preprocessor, precedence, image.",
        ),
    ],
)
def test_what_is_no_control_is_refused(control: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        written(control)
    assert explain(refused.value.errors(), GenerateRequest).message == says


def test_a_control_must_be_one_of_the_model(model: HostedModel) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved(model, {"name": "edges"}, {"name": "pose"})
    assert refused.value.field == "controls.1.name"
    assert refused.value.message == (
        "controls.1.name: 'pose' is not among the ControlNets of model 'toy'; these are: depth, "
        "edges."
    )
    with pytest.raises(InvalidRequest, match="model 'toy' takes no ControlNets"):
        resolved(Toy(), {"name": "edges"})


def test_those_that_never_fit_together_are_refused_for_good(tmp_path: Path) -> None:
    for name in ("edges", "depth"):
        put_plain(tmp_path, name)
    toy = Toy(embeds_scale=False)
    memory = WeightMemory[Control](40, "ControlNets")
    toy.controls = ControlShelf([tmp_path], "toy", Plain(), memory, toy.device, toy.dtype)
    with pytest.raises(InvalidRequest) as refused:
        resolved(toy, {"name": "edges"}, {"name": "depth"})
    assert refused.value.field == "controls"
    assert refused.value.message == (
        "controls: the ControlNets of this request take 48 bytes of memory together; at most 40 "
        "are allowed."
    )
    # A ControlNet with two pictures is counted once, one of scale 0 not at all.
    resolved(toy, {"name": "edges"}, {"name": "edges"}, {"name": "depth", "scale": 0})


def test_those_of_scale_0_are_not_loaded(model: HostedModel) -> None:
    chosen = resolved(model, {"name": "edges", "scale": 0}, {"name": "depth", "end": 0.5}).controls
    pictures = [torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]
    [use] = load_controls(chosen, pictures, model)
    assert (use.control.name, use.picture, use.scale) == ("depth", pictures[1], 1.0)
    assert isinstance(use.control.network, nn.Module)
    assert [use.acts(stage, 4) for stage in range(4)] == [True, True, False, False]


def test_a_window_in_which_no_evaluation_lies_is_said_to_have_no_effect(
    model: HostedModel,
) -> None:
    within = {"name": "edges", "start": 0.3, "end": 0.5}
    request = resolved(model, {"name": "edges"}, within, steps=4)
    layout = request.sampler, request.spacing, request.steps, request.strength
    prepared = prepare(request, model, make_plan(model.default_schedule, *layout))
    assert prepared.warnings == (
        "controls.1 has no effect: no evaluation of this run lies within its start, 0.3, and end, "
        "0.5.",
    )


def test_statistics_of_the_model_alone_serve_no_steered_request(model: HostedModel) -> None:
    exact = {"name": "dpm_solver_v3", "statistics": "exact"}
    request = resolved(model, {"name": "edges"}, sampler=exact, guidance="none")
    with pytest.raises(InvalidRequest, match="a request with `controls`"):
        statistics_for(request, model)


def test_the_catalog_lists_the_controls_of_a_model(model: HostedModel) -> None:
    assert [one.name for one in control_entries(model)] == ["depth", "edges"]
    assert control_entries(Toy()) == ()


def test_the_pictures_of_a_request_are_taken_out_by_path_and_put_back() -> None:
    request = written({"name": "edges"}, {"name": "depth"}, image="Zmlyc3Q=")
    found = dict(uploads_in(request))
    assert list(found) == ["image", "controls.0.image", "controls.1.image"]
    sent: dict[str, Any] = {
        "image": found["image"],
        "controls": [{"name": "edges", "image": found["controls.0.image"]}],
    }
    fields = without_uploads(sent)
    assert fields == {"controls": [{"name": "edges"}]}
    for path in ("image", "controls.0.image"):
        with found[path].opened() as data:
            assert isinstance(data, str)
            put_upload(fields, path, data)
    assert fields == {"image": "Zmlyc3Q=", "controls": [{"name": "edges", "image": PICTURE}]}
