"""Few-step models are sampled as by their authors, if the folder or the operator says how."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from copy import copy as shallow_copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_lcm, scheduling_tcd
from torch import Tensor

from embedded import STUDENT_FOLDER
from samplers import LCMSpacing
from server.engine.state.noise import stage_noise, start_noise
from server.errors import ModelMismatch
from server.models.defaults import ModelDefaults
from server.models.distilled import STATED, distilled_as
from server.models.folder import read_json
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.unet_model import SCHEDULER
from server.requests.chosen import notes_for
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.covering import EVERY_CELL
from tests.server.models.tiny_sdxl import BASE, make, saved
from tests.server.toy_model import run, started

SEED = 5
SHAPE = (4, 32, 32)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(BASE)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline.scheduler = BASE
    return saved(pipeline, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "few"))


@pytest.fixture
def configs(folder: Path, tmp_path: Path) -> Path:
    """A copy without weights, for what can be read from the configs alone."""
    nothing_else = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(folder, tmp_path / "few", ignore=nothing_else))


@pytest.fixture(scope="module")
def base(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="few", device="cpu", dtype="float32")


def told_by(configs: Path) -> ModelDefaults | None:
    """How a folder's U-Net without a guidance scale as input is to be sampled."""
    return distilled_as(configs, read_json(configs, SCHEDULER), embeds_scale=False)


def sampled_as(base: HostedModel, configs: Path) -> HostedModel:
    """The model with the same weights and other configs."""
    model = shallow_copy(base)
    model.facts = replace(base.facts, defaults=told_by(configs))
    return model


def state(folder: Path, said: Any) -> None:
    file = folder / STATED
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(said))


def reschedule(folder: Path, kind: str, **fields: Any) -> None:
    """Replace the folder's scheduler by another class, as a pipeline saves it."""
    edit(folder / "scheduler/scheduler_config.json", _class_name=kind, **fields)
    edit(folder / "model_index.json", scheduler=["diffusers", kind])


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate(
        {"prompt": "a large red circle", "seed": SEED, "width": 64, "height": 64, **fields}
    )


def resolved(model: HostedModel, **fields: Any) -> ResolvedRequest:
    return resolve(asked(**fields), model, Limits(), None)


def ours(model: HostedModel, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Tensor:
    """Final latents of a request."""
    request = resolved(model, **fields)
    layout = request.sampler, request.spacing, request.steps, request.strength
    prepared = prepare(request, model, make_plan(model.default_schedule, *layout))
    seen: list[Tensor] = []
    decode: Callable[[Tensor], Tensor] = model.decode
    engine = started(model, 4)
    monkeypatch.setattr(model, "decode", lambda latents: seen.extend(latents) or decode(latents))
    try:
        run(engine, tasks_of(prepared, model))
    finally:
        engine.stop(0)
    # A preview, if there is one, comes first.
    return seen[-1]


@torch.inference_mode()
def theirs(pipeline: Any, scheduler: Any, **call: Any) -> Tensor:
    """Final latents of diffusers' pipeline, called as in a model card."""
    pipeline.scheduler = scheduler
    latents = start_noise(SEED, SHAPE)[None]
    if isinstance(scheduler, EulerDiscreteScheduler):
        scheduler.set_timesteps(call["num_inference_steps"])
        sigma = float(scheduler.sigmas[0])
        latents = latents * (1 + sigma**2) ** 0.5 / float(scheduler.init_noise_sigma)
    return pipeline(
        "a large red circle",
        latents=latents,
        width=64,
        height=64,
        output_type="latent",
        **{"guidance_scale": 0, **call},
    ).images[0]


@dataclass(frozen=True)
class Card:
    """What the operator states, what a request asks, and the code of the model card."""

    said: dict[str, Any]
    scheduler: type[Any]
    call: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


TRAILING = {"timestep_spacing": "trailing"}
CARDS = {
    # The timesteps that its code lists, not those of four steps by the scheduler alone.
    "dmd2-4": Card(
        {"convention": "dmd2", "steps": 4}, LCMScheduler, {"timesteps": [999, 749, 499, 249]}
    ),
    "dmd2-1": Card({"convention": "dmd2", "steps": 1}, LCMScheduler, {"timesteps": [399]}),
    "one_step": Card({"convention": "one_step"}, LCMScheduler, {"num_inference_steps": 1}),
    "sd_turbo": Card(
        {"convention": "sd_turbo"},
        EulerDiscreteScheduler,
        {"num_inference_steps": 2},
        TRAILING,
        {"steps": 2},
    ),
    "lightning-4": Card(
        {"convention": "lightning", "steps": 4},
        EulerDiscreteScheduler,
        {"num_inference_steps": 4},
        TRAILING,
    ),
    "lightning-1": Card(
        {"convention": "lightning", "steps": 1},
        EulerDiscreteScheduler,
        {"num_inference_steps": 1},
        TRAILING | {"prediction_type": "sample"},
    ),
    "hyper-2": Card(
        {"convention": "hyper", "steps": 2}, DDIMScheduler, {"num_inference_steps": 2}, TRAILING
    ),
    "hyper-1": Card({"convention": "hyper", "steps": 1}, LCMScheduler, {"timesteps": [800]}),
    "hyper_unified": Card(
        {"convention": "hyper_unified", "steps": 3},
        TCDScheduler,
        {"num_inference_steps": 3, "eta": 1.0},
    ),
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_a_request_for_a_prompt_alone_runs_the_lines_of_the_model_card(
    card: Card, pipeline: Any, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Base models are saved so; only TCDScheduler does not read it.
    edit(copy / "scheduler/scheduler_config.json", set_alpha_to_one=False)
    state(copy, card.said)
    found = ours(load(copy), monkeypatch, **card.request)
    stages = iter(range(9))
    for module in (scheduling_lcm, scheduling_tcd, scheduling_ddim):
        monkeypatch.setattr(
            module, "randn_tensor", lambda *_, **__: stage_noise(SEED, next(stages), SHAPE)[None]
        )
    config = dict(BASE.config) | {"set_alpha_to_one": False, "clip_sample": False}
    scheduler = card.scheduler.from_config(config, **card.options)
    expected = theirs(pipeline, scheduler, **card.call)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_latent_consistency_model_of_sdxl_is_told_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the published U-Net, in a pipeline that is called like any other of its class."""
    scheduler = LCMScheduler.from_config(dict(BASE.config) | {"clip_sample": False})
    told = make(scheduler, time_cond_proj_dim=32)
    found = ours(load(saved(told, tmp_path / "lcm")), monkeypatch, steps=2)
    stages = iter(range(9))
    monkeypatch.setattr(
        scheduling_lcm,
        "randn_tensor",
        lambda *_, **__: stage_noise(SEED, next(stages), SHAPE)[None],
    )
    expected = theirs(told, scheduler, num_inference_steps=2, guidance_scale=8.5)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


TOLD: dict[str, tuple[str, dict[str, Any], str]] = {
    "lcm": ("LCMScheduler", {"original_inference_steps": 40}, "lcm_lora"),
    "tcd": ("TCDScheduler", {"original_inference_steps": 40}, "tcd"),
    # `LCMScheduler.from_config` leaves such entries of the scheduler that it replaces.
    "karras": (
        "LCMScheduler",
        {"original_inference_steps": 40, "use_karras_sigmas": True},
        "lcm_lora",
    ),
}


@pytest.mark.parametrize(("kind", "fields", "convention"), TOLD.values(), ids=TOLD.keys())
def test_the_class_of_a_scheduler_tells_the_convention_and_the_times(
    kind: str, fields: dict[str, Any], convention: str, base: HostedModel, configs: Path
) -> None:
    reschedule(configs, kind, **fields)
    model = sampled_as(base, configs)
    assert model.facts.defaults is not None
    assert model.facts.defaults.convention == convention
    request = resolved(model)
    assert (request.sampler.name, request.steps) == (kind.removesuffix("Scheduler").lower(), 4)
    assert request.spacing.model_dump() == {"name": "lcm", "distilled_steps": 40}
    assert request.guidance.name == "none"


@pytest.mark.parametrize("fields", [{"clip_sample": True}, {"original_inference_steps": 0}])
def test_a_scheduler_that_no_sampler_is_equal_to_tells_nothing_but_to_the_log(
    fields: dict[str, Any], configs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reschedule(configs, "LCMScheduler", **fields)
    with caplog.at_level(logging.WARNING):
        assert told_by(configs) is None
    assert "the scheduler's config is not followed" in caplog.text


@pytest.mark.parametrize(
    ("kind", "path", "spacing", "convention"),
    [
        ("EulerDiscreteScheduler", "stabilityai/sd-turbo", "trailing", "sd_turbo"),
        ("EulerAncestralDiscreteScheduler", "./XL_Turbo", "trailing", "sdxl_turbo"),
        ("EulerDiscreteScheduler", "stabilityai/sd-turbo", "leading", None),
        ("EulerDiscreteScheduler", "models/turbocharged", "trailing", None),
        ("DDIMScheduler", "stabilityai/sd-turbo", "trailing", None),
    ],
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"][: 1 + EVERY_CELL])
def test_a_turbo_model_is_told_by_its_name_and_its_scheduler(
    kind: str, path: str, spacing: str, convention: str | None, file: str, configs: Path
) -> None:
    reschedule(configs, kind, timestep_spacing=spacing)
    edit(configs / file, _name_or_path=path)
    own = told_by(configs)
    assert (own and own.convention) == convention


def test_the_network_s_config_may_name_a_turbo_model_too(configs: Path) -> None:
    reschedule(configs, "EulerDiscreteScheduler", timestep_spacing="trailing")
    edit(configs / "unet/config.json", _name_or_path="stabilityai/sd-turbo")
    own = told_by(configs)
    assert own is not None
    assert own.convention == "sd_turbo"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"convention": "lightening"}, "names the convention 'lightening'; allowed are lcm, lcm_"),
        ({"convention": "lightning"}, "are for one number of steps each; add steps, which is 1, 2"),
        ({"convention": "lightning", "steps": 3}, "has the steps 3; models of the convention"),
        ({"convention": "sdxl_turbo", "steps": 50}, "are distilled for 1 to 4"),
        ({"convention": "hyper", "steps": "2"}, r"has the steps '2'; it must be a whole number\.$"),
        (
            {"convention": "hyper", "steps": 2, "eta": 1},
            "has the field 'eta', which is unknown; allowed are con",
        ),
        ({}, "has no convention; allowed are lcm, lcm_lora"),
        ({"convention": "flux_schnell"}, "which is for flow-matching models; this one predicts"),
        (
            {"convention": "lcm"},
            "models with a guidance scale as an input; this one has no time_cond",
        ),
        (
            {"convention": "tcd", "scale": 3},
            "has the scale 3; models of the convention 'tcd' do not",
        ),
        ({"convention": 5}, r"has the convention 5; it must be a string\.$"),
        ({"convention": "lcm", "scale": 30}, r"has the scale 30; it must be at most 20\.$"),
        ({"convention": "hyper", "steps": 0}, r"has the steps 0; it must be at least 1\.$"),
        ([], "does not contain a JSON object"),
    ],
    ids=str,
)
def test_what_an_operator_states_wrongly_is_said(said: Any, sentence: str, configs: Path) -> None:
    state(configs, said)
    with pytest.raises(ModelMismatch, match=sentence) as caught:
        told_by(configs)
    assert STATED in str(caught.value)


def test_what_the_operator_states_comes_before_what_the_configs_tell(configs: Path) -> None:
    reschedule(configs, "TCDScheduler")
    state(configs, {"convention": "hyper_unified"})
    own = told_by(configs)
    assert own is not None
    assert own.convention == "hyper_unified"


@pytest.mark.parametrize(("distilled", "steps"), [(40, 4), (2, 2)])
def test_a_stated_convention_keeps_the_times_of_the_scheduler(
    distilled: int, steps: int, configs: Path
) -> None:
    reschedule(configs, "LCMScheduler", original_inference_steps=distilled)
    state(configs, {"convention": "lcm_lora"})
    own = told_by(configs)
    assert own is not None
    assert (own.spacing, own.steps) == (LCMSpacing(distilled_steps=distilled), steps)


def test_a_stated_number_of_steps_is_one_that_the_scheduler_has(configs: Path) -> None:
    reschedule(configs, "LCMScheduler", original_inference_steps=2)
    state(configs, {"convention": "lcm_lora", "steps": 3})
    with pytest.raises(ModelMismatch, match="has the steps 3; at most 2 are allowed, the original"):
        told_by(configs)


def test_a_model_that_is_told_a_scale_may_state_its_own() -> None:
    own = load(STUDENT_FOLDER).facts.defaults
    assert own is not None
    assert (own.convention, own.steps) == ("lcm", 4)
    assert (own.rule.model_dump()["scale"], own.policy.name) == (2.0, "embedded")


def test_weights_of_one_step_take_other_numbers_with_a_warning(
    base: HostedModel, configs: Path
) -> None:
    state(configs, {"convention": "dmd2", "steps": 1})
    model = sampled_as(base, configs)
    assert resolved(model).spacing.own_steps == resolved(model, steps=1).spacing.own_steps == 1
    request = resolved(model, steps=4)
    assert request.spacing.name == "trailing"
    plan = make_plan(model.default_schedule, request.sampler, request.spacing, 4, None)
    [warning] = prepare(request, model, plan).warnings
    assert warning == "steps is 4; use 1, which model 'few' was distilled for."


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, "sampler 'lcm', spacing 'trailing', steps 4, guidance 'none'"),
        ({"steps": 2}, "sampler 'lcm', spacing 'trailing', guidance 'none'"),
        ({"sampler": "ddim", "guidance": "cfg"}, "spacing 'trailing', steps 4"),
    ],
    ids=["all", "but steps", "spacing and steps"],
)
def test_the_answer_says_what_was_chosen_and_why(
    fields: dict[str, Any], chosen: str, base: HostedModel, configs: Path
) -> None:
    state(configs, {"convention": "dmd2", "steps": 4})
    model = sampled_as(base, configs)
    assert notes_for(asked(**fields), resolved(model, **fields), model) == (
        "Chosen for model 'few', which is sampled by the convention 'dmd2' because "
        f"weft/defaults.json in its folder says so: {chosen}.",
    )
    named = {"sampler": "lcm", "spacing": "trailing", "steps": 4, "guidance": "none"}
    assert notes_for(asked(**named), resolved(model, **named), model) == ()


def test_nothing_is_said_to_be_chosen_for_other_models(base: HostedModel) -> None:
    assert notes_for(asked(), resolved(base), base) == ()
