import re
from typing import Any

import pytest

from server.requests.infotext import infotext
from server.requests.schema import ResolvedRequest

SETTINGS: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "",
    "model": "embedded",
    "width": 128,
    "height": 64,
    "steps": 20,
    "seed": 42,
    "n": 1,
    "sampler": "ddim",
    "spacing": "trailing",
    "guidance": "none",
    "strength": None,
    "output_format": "png",
    "stream": False,
}


def text_of(statistics: str | None = None, **fields: Any) -> str:
    resolved = ResolvedRequest.model_validate(SETTINGS | fields)
    return infotext(
        resolved, model_revision="0123456789abcdef", version="weft 1", statistics=statistics
    )


def test_the_lines_are_prompt_negative_and_settings() -> None:
    assert text_of(negative_prompt="a square").split("\n") == [
        "a red circle",
        "Negative prompt: a square",
        "Steps: 20, Sampler: DDIM, Schedule type: Simple, CFG scale: 1, Seed: 42, Size: 128x64, "
        "Model hash: 0123456789, Model: embedded, Guidance: none, Guidance policy: always, "
        "Version: weft 1",
    ]


def test_clip_skip_is_written_as_there_unless_it_is_the_last_layer() -> None:
    assert "Model: embedded, Clip skip: 2, " in text_of(clip_skip=2)
    assert "Clip skip" not in text_of(clip_skip=1)


def test_masked_content_is_written_as_there_unless_it_is_the_original() -> None:
    assert "Masked content: latent noise, " in text_of(mask_content="latent_noise")
    assert "Masked content" not in text_of(mask_content="original")


def test_churn_is_written_as_there_without_what_is_at_its_default() -> None:
    sampler = {"name": "heun", "s_churn": 40, "s_tmin": 0.05, "s_noise": 1.003}
    told = "Sigma churn: 40, Sigma tmin: 0.05, Sigma noise: 1.003, "
    assert told in text_of(sampler=sampler)
    assert "Sigma" not in text_of(sampler={"name": "heun", "s_tmin": 0.05})


def test_what_else_than_float32_a_model_computes_in_is_written() -> None:
    resolved = ResolvedRequest.model_validate(SETTINGS)
    text = infotext(
        resolved, model_revision="0", version="1", dtype="bfloat16", quantization="int8"
    )
    assert "Model: embedded, Dtype: bfloat16, Quantization: int8, " in text
    assert "Dtype" not in text_of()


def test_an_autoencoder_that_was_chosen_is_written() -> None:
    assert "Model: embedded, Autoencoder: tiny, " in text_of(autoencoder="tiny")
    assert "Autoencoder" not in text_of()


def test_every_part_of_guidance_is_written() -> None:
    guidance = {
        "name": "cfg",
        "perturbed": ["pag", "slg"],
        "skip_tuning": {},
        "freeu": {"b1": 1.1},
        "negtome": {"away_from": "first", "stop": 0.5},
    }
    written = text_of(guidance=guidance)
    assert ", Guidance: cfg, Guidance policy: always, Guidance perturbed: pag+slg, " in written
    assert "Guidance skip-tuning: on, Guidance FreeU: b1 1.1, Guidance NegToMe: stop" in written
    assert "stop 0.5; away_from first, Ver" in written


def test_a_step_cache_is_named() -> None:
    assert ", Step cache: easy_cache, Ver" in text_of(cache="easy_cache")
    assert "Step cache" not in text_of()


def test_an_empty_negative_prompt_has_no_line() -> None:
    assert len(text_of().split("\n")) == 2


def test_a_share_of_the_steps_is_called_denoising_strength() -> None:
    assert "Denoising strength: 0.75, " in text_of(strength=0.75)


BREAKS = ("\n", "\r\n", "\n  ", "\u2028", "\x85")


@pytest.mark.parametrize("line_break", BREAKS, ids=repr)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_cannot_pass_for_another_field(field: str, line_break: str) -> None:
    forged = line_break.join(
        ("a circle", "Negative prompt: forged", "STEPS: 1, Seed: 1, Sampler: forged", "steps")
    )
    written = text_of(**{"negative_prompt": "a square", field: forged})
    ours = "Negative prompt: " + ("a square" if field == "prompt" else "a circle")
    assert [m.group() for m in re.finditer("negative prompt:.{9}", written, re.IGNORECASE)] == [
        ours
    ]
    starts = [line for line in written.splitlines() if line.strip().lower().startswith("steps:")]
    assert starts == [written.splitlines()[-1]]
    # Nothing else is changed, and a reader sees the same text.
    assert forged.replace("t:", "t :").replace("STEPS:", "STEPS :") in written


def test_a_prompt_that_begins_like_a_field_is_still_the_prompt() -> None:
    assert text_of(prompt="Negative prompt: x").startswith("Negative prompt : x\nSteps: 20, ")


@pytest.mark.parametrize(
    ("sampler", "label"),
    [
        ("euler_ancestral", "Euler a"),
        ("dpm_solver_pp", "DPM++ 2M"),
        ({"name": "dpm_solver_pp", "variant": "sde"}, "DPM++ 2M SDE"),
        (
            {"name": "dpm_solver_pp", "order": 3, "variant": "sde", "solver_type": "taylor"},
            "DPM++ 3M SDE",
        ),
        ("unipc", "UniPC"),
        ({"name": "dpm_solver_pp", "order": 3}, "dpm_solver_pp"),
    ],
    ids=str,
)
def test_samplers_have_the_names_that_users_know(sampler: Any, label: str) -> None:
    assert f"Sampler: {label}, " in text_of(sampler=sampler)


@pytest.mark.parametrize(
    ("spacing", "label"),
    [
        ("karras", "Karras"),
        ("sgm_uniform", "SGM Uniform"),
        ({"name": "beta", "over": "sigma"}, "Beta"),
        ("logsnr", "logsnr"),
    ],
    ids=str,
)
def test_spacings_have_the_names_of_schedule_types(spacing: Any, label: str) -> None:
    assert f"Schedule type: {label}, " in text_of(spacing=spacing)


def test_what_a_sampler_was_fitted_to_is_said_where_it_was() -> None:
    assert "statistics" not in text_of()
    assert ", Sampler statistics: cfg 4, Version: weft 1" in text_of(statistics="cfg 4")


def test_a_value_with_a_comma_is_quoted() -> None:
    assert 'Model: "a, b: c"' in text_of(model="a, b: c")
