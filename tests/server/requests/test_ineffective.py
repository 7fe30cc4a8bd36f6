"""What a request sets in vain is said, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.toy_model import Toy


def warnings(guidance: Any, *, has_picture: bool = False, **fields: Any) -> tuple[str, ...]:
    model = Toy()
    request = GenerateRequest.model_validate(
        {"prompt": "x", "negative_prompt": "y", "steps": 6, "guidance": guidance} | fields
    )
    resolved = resolve(request, model, Limits(), (32, 32) if has_picture else None)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    return prepare(resolved, model, make_plan(model.default_schedule, *layout)).warnings


@pytest.mark.parametrize(
    ("guidance", "reason"),
    [
        ("none", "guidance 'none' evaluates the prompt alone"),
        (
            {"name": "apg", "scale": 1, "eta": 1},
            "guidance 'apg' does not use it at these parameters",
        ),
        (
            {"name": "perp_neg", "negative": 0},
            "guidance 'perp_neg' does not use it at these parameters",
        ),
        (
            {"name": "cfg", "policy": "embedded"},
            "with the policy 'embedded' the network guides itself by the prompt alone",
        ),
    ],
)
def test_a_negative_prompt_without_effect_is_said(guidance: Any, reason: str) -> None:
    assert warnings(guidance) == (f"negative_prompt has no effect: {reason}.",)


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
