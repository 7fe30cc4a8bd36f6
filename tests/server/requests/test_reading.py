"""Requests in other programs' terms get what they mean, or an error with the term used here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError

from samplers.names import NoEqual
from samplers.other_names import (
    AUTOMATIC1111,
    COMFYUI,
    COMFYUI_SAMPLERS,
    FORGE,
    FORGE_SCHEDULE_TYPES,
    LACKING,
    SCHEDULE_TYPES,
)
from samplers.timesteps import Karras, Linspace
from server.errors import InvalidRequest
from server.http.native.answers import completed
from server.models.conventions import defaults_by
from server.requests.foreign_names import sampler_of, schedule_of
from server.requests.messages import explain
from server.requests.resolve import resolve
from server.requests.schema import CHOICES, GenerateRequest, ResolvedRequest
from server.requests.stream_schema import StreamSettings, read_settings
from server.service.service import Service
from server.settings import Limits
from tests.server.toy_model import Toy, started


def read(**fields: Any) -> dict[str, Any]:
    """The request without its prompt, each choice as its name and the fields that it sets."""
    request = GenerateRequest.model_validate({"prompt": "x"} | fields)
    return request.model_dump(mode="json", exclude_unset=True, exclude={"prompt"})


def refused(kind: type[GenerateRequest | StreamSettings], **fields: Any) -> tuple[Any, str]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"prompt": "x"} | fields)
    refusal = explain(caught.value.errors(), kind)
    return refusal.field, refusal.message


def resolved(model: Toy, **fields: Any) -> ResolvedRequest:
    return resolve(GenerateRequest.model_validate({"prompt": "x"} | fields), model, Limits(), None)


SAMPLER_NAMES = {
    **{name: one.fields for name, one in {**AUTOMATIC1111, **FORGE}.items()},
    **{alias: one.fields for one in AUTOMATIC1111.values() for alias in one.aliases},
    **{name: fields for name, fields in COMFYUI_SAMPLERS.items() if name not in CHOICES["sampler"]},
    **{f"{name}_gpu": fields for name, fields in COMFYUI_SAMPLERS.items()},
}
SPACING_NAMES = {
    **COMFYUI,
    **{name.lower().replace(" ", "_"): one for name, one in FORGE_SCHEDULE_TYPES.items()},
    **SCHEDULE_TYPES,
}


def test_every_name_of_other_programs_is_accepted() -> None:
    for field, names in (("sampler", SAMPLER_NAMES), ("spacing", SPACING_NAMES)):
        for name, fields in names.items():
            kind = CHOICES[field][fields["name"]]
            request = GenerateRequest.model_validate({"prompt": "x", field: name})
            if name not in CHOICES[field]:
                assert getattr(request, field) == kind.model_validate(fields), name
            as_object = GenerateRequest.model_validate({"prompt": "x", field: {"name": name}})
            assert getattr(as_object, field) == getattr(request, field), name


@pytest.mark.parametrize(
    ("given", "expected", "note"),
    [
        (
            {"sampler": "DPM++ 2M Karras"},
            {
                "sampler": {"name": "dpm_solver_pp", "lower_order_final": False},
                "spacing": {"name": "karras"},
            },
            'sampler \'DPM++ 2M Karras\' is {"name": "dpm_solver_pp", "lower_order_final": false} '
            "here, with spacing 'karras'.",
        ),
        (
            {"sampler": "DPM++ SDE Karras", "spacing": "Exponential"},
            {"sampler": {"name": "dpm_solver_pp_sde"}, "spacing": {"name": "exponential"}},
            "spacing 'Exponential' is 'exponential' here.",
        ),
        (
            {"sampler": {"name": "ddpm", "eta": 0.5}, "spacing": {"name": "beta57", "beta": 0.6}},
            {
                "sampler": {"name": "ddim", "eta": 0.5},
                "spacing": {"name": "beta", "alpha": 0.5, "beta": 0.6},
            },
            'sampler \'ddpm\' is {"name": "ddim", "eta": 1.0} here.',
        ),
        (
            {"sampler_name": "DPM2 a", "scheduler": "Automatic", "num_inference_steps": 20},
            {
                "sampler": {"name": "dpm_2", "eta": 1.0},
                "spacing": {"name": "karras"},
                "steps": 20,
            },
            "Read num_inference_steps as steps, sampler_name as sampler, scheduler as spacing.",
        ),
        (
            {"scheduler": "EulerDiscreteScheduler"},
            {"sampler": {"name": "euler"}, "spacing": {"name": "linspace"}},
            "Read scheduler as sampler.",
        ),
        (
            {"sampler": "euler_cfg_pp", "cfg_scale": 0.8},
            {
                "sampler": {"name": "euler"},
                "guidance": {"name": "cfg_plus_plus", "scale": 0.8},
            },
            "sampler 'euler_cfg_pp' is 'euler' here, with guidance 'cfg_plus_plus'.",
        ),
        # A name that Weft has keeps Weft's meaning, though ComfyUI's ddim is Euler's method.
        ({"sampler": "ddim", "spacing": "beta"}, {"sampler": {"name": "ddim"}}, None),
        ({"size": "64x32", "seed": -1, "scheduler": None}, {"width": 64, "height": 32}, None),
        ({"size": "auto", "resize_mode": 1}, {"resize_mode": "crop"}, None),
    ],
    ids=str,
)
def test_what_is_meant_is_read(
    given: dict[str, Any], expected: dict[str, Any], note: str | None
) -> None:
    assert expected.items() <= read(**given).items()
    notes = GenerateRequest.model_validate({"prompt": "x"} | given).reading.notes
    assert (note in notes) if note else not notes


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        (
            {"steps": 3, "num_inference_steps": 4},
            "num_inference_steps",
            "num_inference_steps means steps, which is set too; send one of them.",
        ),
        (
            {"guidance": {"name": "cfg", "scale": 3}, "cfg_scale": 4},
            "cfg_scale",
            "cfg_scale means guidance.scale, which is set too; send one of them.",
        ),
        (
            {"particles": "fkc"},
            "particles",
            'particles is a field of guidance; send it within: {"guidance": {"particles": ...}}.',
        ),
        ({"size": "big"}, "size", "size is 'big'; it must be like '512x512', or width and height"),
        (
            {"size": "64x64", "width": 64},
            "size",
            "size sets the width, which is set too; send one of them.",
        ),
        (
            {"sampler": "DDIM CFG++", "guidance": "cfg"},
            "sampler",
            "sampler 'DDIM CFG++' is 'ddim' here, with guidance 'cfg_plus_plus'; do not",
        ),
        ({"cfg_scale": "7"}, "guidance.scale", "guidance.scale is '7'; it must be a number."),
    ],
    ids=str,
)
def test_what_says_two_things_is_refused(given: dict[str, Any], field: str, message: str) -> None:
    named, sentence = refused(GenerateRequest, **given)
    assert named == field
    assert sentence.startswith(message)


@pytest.mark.parametrize(
    "given",
    [{"guidance": {"scale": 5}}, {"guidance": 5}, {"cfg_scale": 5}, {"guidance_scale": 5.0}],
    ids=str,
)
def test_a_scale_without_a_rule_goes_to_the_default_rule(given: dict[str, Any]) -> None:
    plain = resolved(Toy()).guidance
    assert resolved(Toy(), **given).guidance == plain.model_copy(update={"scale": 5.0})
    own = Toy(defaults=defaults_by("lcm", "its name says so"), embeds_scale=True)
    default = resolved(own).guidance
    assert resolved(own, **given).guidance == default.model_copy(update={"scale": 5.0})


def test_a_model_sampled_without_guidance_says_so_to_a_scale() -> None:
    distilled = Toy(defaults=defaults_by("tcd", "its name says so"))
    assert resolved(distilled, guidance_scale=0, steps=2).guidance.name == "none"
    with pytest.raises(InvalidRequest, match="default for model 'toy' is 'none', which has no sc"):
        resolved(distilled, guidance_scale=5, steps=2)


def test_the_answer_says_how_the_request_was_read() -> None:
    model = Toy()
    engine = started(model, 4)
    service = Service(Limits())
    service.open(engine, {"toy": model})

    async def answer(body: GenerateRequest) -> Any:
        generation = await service.admit(body, "it")
        try:
            return completed(generation, await service.pictures(generation))
        finally:
            service.release(generation)

    try:
        body = {"prompt": "a", "steps": 2, "sampler": "Euler Karras", "cfg_scale": 3}
        answered = asyncio.run(answer(GenerateRequest.model_validate(body)))
    finally:
        engine.stop(0)
    assert answered.notes == [
        "sampler 'Euler Karras' is 'euler' here, with spacing 'karras'.",
        'guidance names no rule and is {"name": "apg", "scale": 3.0}.',
    ]
    assert answered.settings["sampler"]["name"] == "euler"
    assert answered.settings["spacing"]["name"] == "karras"


def test_a_stream_reads_names_and_answers_other_words_with_ours() -> None:
    fields = {"prompt": "x", "sampler": "Euler a Karras", "guidance": {"scale": 2}, "seed": -1}
    request = read_settings(fields).request()
    assert (request.sampler, request.spacing) == (CHOICES["sampler"]["euler_ancestral"](), Karras())
    assert request.seed is None
    assert request.reading.rule_left_out
    assert len(request.reading.notes) == 1
    # Later messages are merged over earlier ones, so a field has only one name.
    assert refused(StreamSettings, num_inference_steps=4)[1].startswith(
        "num_inference_steps is not a known field (did you mean steps?)"
    )


def test_names_for_other_faces() -> None:
    assert sampler_of("Euler a", "Automatic")[1] == Linspace()
    assert sampler_of("DPM++ 2M Karras", "Automatic")[1] == Karras()
    assert sampler_of("euler", "Karras") == (CHOICES["sampler"]["euler"](), Karras())
    assert sampler_of("unipc")[1] is None
    assert schedule_of("Automatic") is None
    # Two of the names also exist here.
    for name in set(LACKING) - set(CHOICES["sampler"]):
        with pytest.raises(NoEqual, match=" has no equivalent here: "):
            sampler_of(name)
