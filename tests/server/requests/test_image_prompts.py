"""The field `image_prompts` of a request: what it may hold, and what is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.models.image_prompts.region import region_of
from server.models.loading import load_model
from server.requests.catalog import ImagePromptEntry, image_prompt_entries
from server.requests.image_prompts import load_image_prompts, unloaded_image_prompts
from server.requests.infotext import infotext
from server.requests.messages import explain
from server.requests.resolve import make_plan, prepare, resolve, statistics_for
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.settings import Limits
from tests.server.models import tiny_sd
from tests.server.models.image_prompts.tiny_image_prompts import (
    SIDE,
    put_adapter,
    put_encoder,
    shelf_of,
)
from tests.server.models.tiny_sdxl import BASE
from tests.server.toy_model import Toy

PICTURE = "aGVsbG8="


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    """A model with IP-Adapters called style and face."""
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny_sd.make(BASE)
    pipeline.save_pretrained(folder / "tiny")
    made = load_model(folder / "tiny", name="tiny", device="cpu", dtype="float32")
    put_adapter(pipeline.unet, folder / "adapters", "style", 1)
    put_adapter(pipeline.unet, folder / "adapters", "face", 2, tokens=5)
    put_encoder(folder / "adapters")
    made.image_prompts = shelf_of(made, folder / "adapters")
    return made


def written(*prompts: dict[str, Any], **fields: Any) -> GenerateRequest:
    sent = [{"image": PICTURE, **one} for one in prompts]
    return GenerateRequest.model_validate(
        {"prompt": "x", "seed": 5, "image_prompts": sent, **fields}
    )


def resolved(model: HostedModel, *prompts: dict[str, Any], **fields: Any) -> ResolvedRequest:
    return resolve(written(*prompts, **fields), model, Limits(), None)


def test_settings_and_infotext_have_all_but_the_pictures(model: HostedModel) -> None:
    request = resolved(model, {"name": "style", "scale": 0.6, "start": 0.1, "end": 0.8})
    settings = request.settings()
    assert settings["image_prompts"] == [{"name": "style", "scale": 0.6, "start": 0.1, "end": 0.8}]
    with pytest.raises(ValidationError) as refused:
        GenerateRequest.model_validate(settings)
    said = explain(refused.value.errors(), GenerateRequest)
    assert said.message == "image_prompts.0.image is required."
    text = infotext(request, model_revision="0", version="weft 1")
    inner = "Model: style, Weight: 0.6, Guidance Start: 0.1, Guidance End: 0.8"
    assert f'IP-Adapter 0: "{inner}"' in text


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"name": "style", "scale": 5}, "image_prompts.0.scale is 5; it must be at most 4."),
        (
            {"name": "style", "start": 0.5, "end": 0.5},
            "image_prompts.0: start is 0.5; it must be less than end, 0.5.",
        ),
        (
            {"name": "style", "weight": 1},
            "image_prompts.0.weight is not a known field; allowed are: name, scale, start, end, "
            "image, mask.",
        ),
        (
            {"name": "style", "image": []},
            "image_prompts.0.image has 0 entries; it must have at least 1.",
        ),
        (
            {"name": "style", "image": [PICTURE, 7]},
            "image_prompts.0.image.1 is 7; it must be a string.",
        ),
    ],
)
def test_what_is_no_image_prompt_is_refused(prompt: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        written(prompt)
    assert explain(refused.value.errors(), GenerateRequest).message == says


def test_an_adapter_must_be_one_of_the_model(model: HostedModel) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved(model, {"name": "style"}, {"name": "hand"})
    assert refused.value.field == "image_prompts.1.name"
    assert refused.value.message == (
        "image_prompts.1.name: 'hand' is not among the IP-Adapters of model 'tiny'; these are: "
        "face, style."
    )
    with pytest.raises(InvalidRequest, match="model 'toy' takes no image prompts"):
        resolved(Toy(), {"name": "style"})


def test_those_of_scale_0_are_not_loaded_and_what_is_not_loaded_is_counted(
    model: HostedModel,
) -> None:
    face = {"name": "face", "end": 0.5, "image": [PICTURE, PICTURE], "mask": PICTURE}
    request = written({"name": "style", "scale": 0}, face)
    chosen = resolve(request, model, Limits(), None)
    pictures = [[torch.zeros(3, SIDE, SIDE)], [torch.ones(3, SIDE, SIDE)] * 2]
    regions = [None, torch.ones(16, 24)]
    [use] = load_image_prompts(chosen.image_prompts, pictures, regions, model)
    assert (use.adapter.name, use.pictures, use.scale) == ("face", tuple(pictures[1]), 1.0)
    assert [use.acts(stage, 4) for stage in range(4)] == [True, True, False, False]
    [counted] = unloaded_image_prompts(request.image_prompts, 24, 16, model)
    attention, region = model.image_attention, region_of(torch.ones(16, 24), 8, 12)
    assert attention is not None
    assert set(region) == {96, 24, 6, 2, 1}
    tokens = torch.zeros(10, attention.widths.text)
    keys = attention.shown(use.adapter, tokens, tokens)[:2]
    held = sum(one.nbytes for one in (*keys, *region.values()))
    assert counted.kv_bytes == use.kv_bytes == held
    assert counted.nbytes == use.nbytes == held + 4 * (2 * 3 * SIDE**2 + 16 * 24)


def test_a_window_without_an_evaluation_is_said_to_have_no_effect(model: HostedModel) -> None:
    within = {"name": "style", "start": 0.3, "end": 0.5}
    request = resolved(model, {"name": "style"}, within, steps=4)
    layout = request.sampler, request.spacing, request.steps, request.strength
    prepared = prepare(request, model, make_plan(model.default_schedule, *layout))
    [said] = [one for one in prepared.warnings if "no effect" in one]
    assert said.startswith("image_prompts.1 has no effect: no evaluation of this run lies within")


def test_statistics_of_the_model_alone_serve_no_request_with_pictures(model: HostedModel) -> None:
    exact = {"name": "dpm_solver_v3", "statistics": "exact"}
    request = resolved(model, {"name": "style"}, sampler=exact, guidance="none")
    with pytest.raises(InvalidRequest, match="a request with `image_prompts`"):
        statistics_for(request, model)


def test_the_catalog_lists_the_adapters_of_a_model(model: HostedModel) -> None:
    assert image_prompt_entries(model) == (
        ImagePromptEntry(name="face", tokens=5),
        ImagePromptEntry(name="style", tokens=4),
    )
    assert image_prompt_entries(Toy()) == ()
