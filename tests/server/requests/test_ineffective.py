"""Settings of a request that have no effect are reported, and no others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guidance import Edit
from server.models.conventions import CONVENTIONS, defaults_by
from server.models.defaults import ModelDefaults
from server.models.hosted import HostedModel
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.toy_model import Toy


def warnings(
    guidance: Any, *, model: HostedModel | None = None, has_picture: bool = False, **fields: Any
) -> tuple[str, ...]:
    model = model or Toy(embeds_scale=False)
    request = GenerateRequest.model_validate(
        {"prompt": "x", "negative_prompt": "y", "steps": 6, "guidance": guidance} | fields
    )
    resolved = resolve(request, model, Limits(), (32, 32) if has_picture else None)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    return prepare(resolved, model, make_plan(model.default_schedule, *layout)).warnings


def test_masked_content_of_a_run_from_noise_alone_is_said_to_have_no_effect() -> None:
    """A network that is shown picture and mask draws the content anew at strength 1."""
    sent: dict[str, Any] = {"image": "x", "mask": "x", "mask_content": "fill"}
    shown = Toy(embeds_scale=False, reads_mask=True)
    (said,) = warnings("cfg", model=shown, has_picture=True, **sent)
    assert said.startswith("mask_content has no effect: at strength 1 model 'toy'")
    assert warnings("cfg", model=shown, has_picture=True, **sent, strength=0.5) == ()
    assert warnings("cfg", has_picture=True, **sent) == ()


def test_churn_that_no_step_has_is_said() -> None:
    sampler = {"name": "heun", "s_churn": 4, "s_tmax": 1e-3}
    (said,) = warnings("cfg", sampler=sampler)
    assert said.startswith("sampler 'heun' adds no noise by s_churn: no step after the first")
    for acts in ({"s_tmax": None}, {"s_tmax": None, "s_noise": 0}):
        assert warnings("cfg", sampler=sampler | acts) == ()


@pytest.mark.parametrize(
    ("guidance", "reason"),
    [
        ("none", "guidance 'none' evaluates only the prompt"),
        (
            {"name": "apg", "scale": 1, "eta": 1},
            "guidance 'apg' does not use it at these parameters",
        ),
        (
            {"name": "perp_neg", "negative": 0},
            "guidance 'perp_neg' does not use it at these parameters",
        ),
    ],
)
def test_a_negative_prompt_without_effect_is_said(guidance: Any, reason: str) -> None:
    assert warnings(guidance) == (f"negative_prompt has no effect: {reason}.",)


def test_a_negative_prompt_has_no_effect_where_the_network_guides_itself() -> None:
    assert warnings({"name": "cfg", "policy": "embedded"}, model=Toy()) == (
        "negative_prompt has no effect: with the policy 'embedded' the network applies guidance "
        "itself and reads only the prompt.",
    )


def test_a_negative_prompt_is_not_evaluated_where_the_picture_stands_for_it() -> None:
    assert warnings({"name": "cfg", "policy": "residual"}, has_picture=True) == (
        "negative_prompt has no effect: the policy 'residual' never evaluates it with these "
        "parameters.",
    )


@pytest.mark.parametrize(
    "guidance",
    [None, "perp_neg", "composed", {"name": "cfg", "policy": "interval"}],
    ids=["default", "perp_neg", "composed", "interval"],
)
def test_a_negative_prompt_that_acts_is_not_warned_of(guidance: Any) -> None:
    assert warnings(guidance) == ()


def test_a_negative_prompt_that_a_part_reads_is_not_warned_of() -> None:
    assert warnings({"name": "none", "nag": {}}) == ()


@pytest.mark.parametrize("negative", [None, ""])
def test_no_negative_prompt_is_not_warned_of(negative: str | None) -> None:
    assert warnings("none", negative_prompt=negative) == ()


UNGUIDED = defaults_by("tcd", "the test says so")


class WithoutCrossAttention(Toy):
    """A toy without attention that could be guided away from a text."""

    def refuses(self, edit: Edit) -> str | None:
        return "makes no edits"


EMBEDDED = {"name": "cfg", "policy": "embedded"}


@pytest.mark.parametrize(
    ("model", "offers"),
    [
        (Toy(), [EMBEDDED, EMBEDDED | {"nag": {}}]),
        (
            Toy(embeds_scale=False, defaults=UNGUIDED),
            [{"name": "none"}, {"name": "none", "nag": {}}],
        ),
        (WithoutCrossAttention(), [EMBEDDED]),
    ],
    ids=["embeds the scale", "unguided", "without cross-attention"],
)
def test_several_predictions_of_a_distilled_model_are_warned_of(
    model: HostedModel, offers: list[dict[str, Any]]
) -> None:
    instead = ", or ".join(map(json.dumps, offers))
    if len(offers) > 1:
        instead += " to steer away from a negative prompt"
    assert warnings({"name": "cfg", "scale": 3.0}, model=model) == (
        "guidance 'cfg' combines several predictions, but model 'toy' was distilled to be sampled "
        f"from one; use {instead}.",
    )
    for offered in offers:
        assert warnings(offered, model=model, negative_prompt=None) == ()


def test_several_predictions_are_warned_of_whatever_the_convention() -> None:
    for name in CONVENTIONS:
        own = defaults_by(name, "the test says so")
        model = Toy(embeds_scale=own.policy.embeds, defaults=own)
        warned = warnings({"name": "cfg", "scale": 3.0}, model=model, steps=own.steps)
        if own.rule.combines and not own.policy.embeds:
            # This is the convention of a model that was not distilled.
            assert warned == (), name
            continue
        [said] = warned
        offered = EMBEDDED if own.policy.embeds else {"name": "none"}
        assert f"distilled to be sampled from one; use {json.dumps(offered)}, or " in said, name
        assert '"nag": {}' in said, name


@pytest.mark.parametrize(
    ("own", "steps", "numbers"),
    [
        (defaults_by("lightning", "", steps=4), 1, "4"),
        (defaults_by("dmd2", "", steps=1), 4, "1"),
        (defaults_by("lcm_lora", ""), 25, "1 to 8"),
        (defaults_by("lcm_lora", ""), 8, None),
        (defaults_by("tcd", ""), 25, None),
    ],
    ids=lambda one: None if isinstance(one, int) else "",
)
def test_a_number_of_steps_that_the_model_was_not_distilled_for_is_said(
    own: ModelDefaults, steps: int, numbers: str | None
) -> None:
    model = Toy(embeds_scale=False, defaults=own)
    found = warnings(None, model=model, steps=steps, negative_prompt=None)
    said = f"steps is {steps}; use {numbers}, which model 'toy' was distilled for."
    assert found == (() if numbers is None else (said,))


def test_a_distilled_model_is_not_warned_of_at_a_scale_of_one() -> None:
    assert warnings({"name": "cfg", "scale": 1}, model=Toy(), negative_prompt=None) == ()
