"""Requests of AUTOMATIC1111's clients, translated to ours."""

from __future__ import annotations

import time
from typing import Any

import pytest
from webuiapi import HiResUpscaler

from samplers import SAMPLERS, SPACINGS
from server.errors import InvalidRequest
from server.requests.automatic1111 import Img2Img, Txt2Img, translated
from server.requests.automatic1111_hires import LATENT_UPSCALERS
from server.requests.automatic1111_names import (
    sampler_and_spacing,
    sampler_labels,
    schedule_labels,
)
from server.requests.choice import name_of
from server.requests.conjunction import split_prompt
from server.requests.hires import UPSCALER_LABELS
from server.requests.infotext import infotext
from server.requests.lora_tags import Tagged, read_tags
from server.requests.read_infotext import read_infotext
from server.requests.schema import GenerateRequest, ResolvedRequest


def request(**fields: Any) -> GenerateRequest:
    return translated(Txt2Img.model_validate(fields), None, ("ink",), 32, (64, 64)).request


def ignored(**fields: Any) -> tuple[str, ...]:
    return translated(Txt2Img.model_validate(fields), None, ("ink",), 32, (64, 64)).ignored


@pytest.mark.parametrize(
    ("prompt", "tagged"),
    [
        ("a cat", Tagged("a cat", {}, ())),
        ("a <lora:ink:0.5> cat", Tagged("a  cat", {"ink": 0.5}, ())),
        ("<lora:ink>", Tagged("", {"ink": 1.0}, ())),
        ("<LORA:ink:0.2:0.7>", Tagged("", {"ink": 0.7}, ())),
        ("<lora:ink:te=0.2:unet=0.7>", Tagged("", {"ink": 0.7}, ())),
        ("<lora:ink:te=0.2>", Tagged("", {"ink": 0.2}, ())),
        ("<lora:ink:1><lora:ink:-2>", Tagged("", {"ink": -2.0}, ())),
        ("<hypernet:old:1>", Tagged("", {}, ("<hypernet:old:1>",))),
        ("<lora:ink:much>", Tagged("", {}, ("<lora:ink:much>",))),
        ("1 < 2 <b>", Tagged("1 < 2 <b>", {}, ())),
    ],
)
def test_tags_are_taken_out_of_a_prompt(prompt: str, tagged: Tagged) -> None:
    assert read_tags(prompt) == tagged


def test_a_lora_of_the_model_acts_and_another_is_named() -> None:
    prompt = "a cat <lora:ink:0.5><lora:oil:1>"
    (adapter,) = request(prompt=prompt).adapters
    assert (adapter.name, adapter.weight) == ("ink", 0.5)
    assert ignored(prompt=prompt) == ("Ignored, because there is no equivalent here: <lora:oil>.",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"clip_skip": 1, "override_settings": {"CLIP_stop_at_last_layers": 0}}, None),
        ({"clip_skip": 2}, 2),
        ({"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 3}}, 3),
        ({"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 1}}, None),
        ({"infotext": "a cat\nSteps: 20, Clip skip: 2, Seed: 5"}, 2),
    ],
)
def test_clip_skip_is_the_setting_and_one_is_the_models_own(
    fields: dict[str, Any], expected: int | None
) -> None:
    assert request(**fields).clip_skip == expected
    assert not ignored(**fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"scale": 2, "strength": 0.75}),
        ({"hr_scale": 1.5, "denoising_strength": 0.4}, {"scale": 1.5, "strength": 0.4}),
        ({"width": 64, "hr_resize_x": 160}, {"scale": 2.5, "strength": 0.75}),
        ({"hr_resize_x": 96, "hr_resize_y": 128}, {"width": 96, "height": 128, "strength": 0.75}),
        ({"denoising_strength": 0, "hr_second_pass_steps": 10}, {"steps": 10, "strength": 0.1001}),
    ],
)
def test_hires_fix_is_a_second_run(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    second = request(prompt="x", enable_hr=True, hr_upscaler="Lanczos", **fields).hires
    assert second is not None
    if "scale" in expected:
        assert second.scale == expected.pop("scale")
    assert second.upscaler == "lanczos"
    told = second.model_dump(exclude_none=True, exclude={"scale", "upscaler"})
    assert told == pytest.approx(expected)
    assert request(prompt="x", **fields).hires is None


def test_every_upscaler_of_latents_is_taken_by_its_name() -> None:
    theirs = [one.value for one in HiResUpscaler if one.value.startswith("Latent")]
    for name in theirs:
        second = request(prompt="x", enable_hr=True, hr_upscaler=name).hires
        assert second is not None
        assert UPSCALER_LABELS[second.upscaler] == name
    assert sorted(theirs) == sorted(LATENT_UPSCALERS)


def test_what_the_second_run_has_from_the_first_is_named_only_if_it_differs() -> None:
    told = {"prompt": "x", "sampler_name": "Euler", "enable_hr": True, "hr_upscaler": "None"}
    assert ignored(**told, hr_sampler_name="Euler", hr_prompt="x", hr_scheduler=None) == ()
    (sentence,) = ignored(**told, hr_sampler_name="DDIM", hr_prompt="y")
    assert sentence.endswith("here: hr_sampler_name, hr_prompt.")
    body = Img2Img.model_validate({"init_images": "x", "enable_hr": True})
    started = translated(body, None, (), 32, (64, 64))
    assert started.request.hires is None
    assert "enable_hr" in started.ignored[0]


def test_every_listed_sampler_and_schedule_type_is_taken() -> None:
    for label, aliases in sampler_labels().items():
        for name in (label, *aliases):
            sampler_and_spacing(name, "automatic")
    for label in schedule_labels():
        for name in (label, label.casefold().replace(" ", "_")):
            sampler_and_spacing("Euler", name)
    ours = {request(sampler_name=name).sampler for name in sampler_labels()}
    assert {one.name for one in ours if one} == {name_of(kind) for kind in SAMPLERS}
    spaced = {sampler_and_spacing("Euler", name)[1] for name in schedule_labels()}
    assert {one.name for one in spaced if one} == {name_of(kind) for kind in SPACINGS} - {"custom"}


def test_a_name_means_what_it_means_to_automatic1111() -> None:
    """There `UniPC` has order 3 and `Beta` is over sigma; here, order 2 and over time."""
    sampler, spacing = sampler_and_spacing("unipc", "beta")
    assert sampler.model_dump()["order"] == 3
    assert spacing is not None
    assert spacing.model_dump()["over"] == "sigma"
    karras = sampler_and_spacing("DPM++ 2M", "Automatic")[1]
    assert karras is not None
    assert karras.name == "karras"


def test_fitted_samplers_take_the_statistics_that_there_are_whatever_the_scale() -> None:
    sampler = request(sampler_name="dpm_solver_v3", cfg_scale=7).sampler
    assert sampler is not None
    assert sampler.model_dump()["statistics"] == "nearest"


def test_eta_goes_to_samplers_that_take_it_there() -> None:
    for name, taken in (("Euler a", True), ("DDIM", True), ("DPM2 a", True), ("DPM2", False)):
        sampler = request(sampler_name=name, eta=0.25).sampler
        assert sampler is not None
        assert (sampler.model_dump()["eta"] == 0.25) is taken, name


def test_churn_is_given_to_the_samplers_that_have_it_there() -> None:
    asked: dict[str, Any] = {"s_churn": 40, "s_tmin": 0.05, "s_tmax": 0, "s_noise": 1.003}
    for name, has_it in (("Euler", True), ("Heun", True), ("DPM2", True), ("DPM2 a", False)):
        sampler = request(sampler_name=name, **asked).sampler
        assert sampler is not None
        wanted = asked | {"s_tmax": None} if has_it else {"s_churn": 0, "s_noise": 1}
        assert sampler.model_dump(include=set(wanted)) == wanted
        assert bool(ignored(sampler_name=name, **asked)) is not has_it
    text = "a cat\nSteps: 20, Sampler: Heun, Sigma churn: 40, Sigma tmin: 0.05, Sigma noise: 1.003"
    assert request(infotext=text).sampler == request(sampler_name="Heun", **asked).sampler
    assert ignored(**asked)[0].endswith(": s_churn, s_tmin, s_noise.")


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({"seed": -1}, {"seed": None}),
        ({"seed": "7", "steps": 20.0}, {"seed": 7, "steps": 20}),
        ({"batch_size": 2, "n_iter": 3}, {"n": 6}),
        ({"width": 517, "height": 3}, {"width": 512, "height": 32}),
        ({"negative_prompt": ""}, {"negative_prompt": None}),
        ({"prompt": None, "hr_scale": 2, "foo": {}}, {"prompt": ""}),
        ({"prompt": "a (cat:1.2)"}, {"prompt_syntax": "automatic1111"}),
        ({"prompt": "a cat", "negative_prompt": "x " * 50}, {"prompt_syntax": "automatic1111"}),
        ({"prompt": "a cat", "negative_prompt": "x"}, {"prompt_syntax": None}),
    ],
)
def test_fields_are_read_as_there(fields: dict[str, Any], ours: dict[str, Any]) -> None:
    assert request(**fields).model_dump(include=set(ours)) == ours


def test_a_scale_is_plain_guidance_and_up_to_one_is_none() -> None:
    guided, plain, own = request(cfg_scale=7), request(cfg_scale=1), request()
    assert guided.guidance is not None
    assert (guided.guidance.name, guided.guidance.model_dump()["scale"]) == ("cfg", 7)
    assert plain.guidance is not None
    assert plain.guidance.name == "none"
    assert own.guidance is None


def test_what_would_change_the_image_is_named_and_defaults_are_not() -> None:
    assert ignored(restore_faces=False, styles=[], script_name=None, s_noise=1.0) == ()
    (sentence,) = ignored(tiling=True, styles=["x"], override_settings={"eta_noise_seed_delta": 1})
    assert sentence.endswith(": styles, tiling, override_settings.eta_noise_seed_delta.")


@pytest.mark.parametrize(
    ("mode", "ours", "said"),
    [(0, "stretch", False), (1, "crop", False), (2, "fill", False), (3, "stretch", True)],
)
def test_images_are_resized_as_there(mode: int, ours: str, said: bool) -> None:
    body = Img2Img.model_validate({"init_images": "x", "resize_mode": mode})
    read = translated(body, None, (), 32, (64, 64))
    assert read.request.resize_mode == ours
    assert bool(read.ignored) == said


def test_a_refusal_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match="steps is 0"):
        request(steps=0)
    with pytest.raises(InvalidRequest, match="similar names are: Euler a"):
        request(sampler_name="Euler b")


def test_our_own_text_reads_back() -> None:
    given = {
        "prompt": 'a "red", cat\nSteps: away',
        "negative_prompt": "blurry, low",
        "model": "a, b",
        "width": 128,
        "height": 64,
        "steps": 7,
        "seed": 42,
        "n": 1,
        "sampler": {"name": "dpm_solver_pp", "lower_order_final": False},
        "spacing": "karras",
        "guidance": {"name": "cfg", "scale": 5.5},
        "strength": 0.5,
        "output_format": "png",
        "stream": False,
    }
    settings = ResolvedRequest.model_validate(given)
    text = infotext(settings, model_revision="0123456789abcdef", version="1")
    found = read_infotext(text)
    assert found["Prompt"] == 'a "red", cat\nSteps : away'
    assert found["Model"] == "a, b"
    again = request(infotext=text, steps=9)
    assert again.model_dump(include={"seed", "width", "height", "steps", "negative_prompt"}) == {
        "seed": 42,
        "width": 128,
        "height": 64,
        "steps": 9,
        "negative_prompt": "blurry, low",
    }
    assert again.sampler == settings.sampler
    assert again.spacing == settings.spacing


def test_from_an_image_one_step_is_run_at_least() -> None:
    one = {"init_images": "AA==", "steps": 1, "denoising_strength": 0}
    assert translated(Img2Img.model_validate(one), None, (), 32, (512, 512)).request.strength == 1


def test_a_text_of_few_fields_is_a_prompt() -> None:
    assert read_infotext("a cat, Steps: 3") == {"Prompt": "a cat, Steps: 3", "Negative prompt": ""}


@pytest.mark.parametrize("text", ["a" + " " * 1500 + "b", "a" * 30000, 'a: "b,' * 10000])
def test_the_time_to_read_a_text_is_proportional_to_its_length(text: str) -> None:
    began = time.process_time()
    read_infotext(text)
    assert time.process_time() - began < 2


def test_masked_content_is_what_its_number_means_there() -> None:
    fills = ("fill", "original", "latent_noise", "latent_nothing")
    for number, content in enumerate(fills):
        body = {"init_images": "x", "mask": "x", "inpainting_fill": number}
        read = translated(Img2Img.model_validate(body), None, (), 32, (64, 64))
        assert read.request.mask_content == content
        assert read.ignored == ()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat :1.2", [("a cat :1.2", 1.0)]),
        ("a cat AND a hat :0.8", [("a cat", 1.0), ("a hat", 0.8)]),
        ("a cat:-.5 AND a hat AND x: y", [("a cat", -0.5), ("a hat", 1.0), ("x: y", 1.0)]),
        ("SAND ANDY", [("SAND ANDY", 1.0)]),
    ],
)
def test_prompts_are_parted_as_there(text: str, parts: list[tuple[str, float]]) -> None:
    assert split_prompt(text) == parts


def test_prompts_joined_by_and_are_composed_and_the_first_one_leads_away_from_nothing() -> None:
    read = request(prompt="a cat :-0.5 AND a hat :2 AND a dog", cfg_scale=3)
    assert read.prompt == "a hat"
    assert read.guidance is not None
    told = read.guidance.model_dump(include={"name", "scale", "prompts"})
    others = [{"prompt": "a cat", "weight": -1.5}, {"prompt": "a dog", "weight": 3.0}]
    assert told == {"name": "composed", "scale": 6.0, "prompts": tuple(others)}
    away = request(prompt="a :-1 AND b :-1", cfg_scale=3).guidance
    assert away is not None
    assert away.model_dump()["scale"] == 0
    assert len(away.model_dump()["prompts"]) == 2
