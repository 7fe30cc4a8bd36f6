import json
import sys
from itertools import product
from typing import Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from guidance import PERTURBATIONS, POLICIES, RULES, SkipTuning
from samplers import DDIM, SAMPLERS, SPACINGS
from server.errors import WeftError
from server.requests.choice import choice, name_of
from server.requests.messages import explain
from server.requests.schema import DEFAULT_SAMPLER, GenerateRequest, default_sampler, split

REGISTRIES: list[tuple[str, type[BaseModel]]] = [
    *(("sampler", member) for member in SAMPLERS),
    *(("spacing", member) for member in SPACINGS),
    *(("guidance", member) for member in RULES),
]


def sentence(**fields: Any) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate({"prompt": "x"} | fields)
    refusal = explain(caught.value.errors(), GenerateRequest)
    return refusal.field, refusal.message


def test_a_bare_name_stands_for_the_defaults() -> None:
    for field, member in REGISTRIES:
        bare = GenerateRequest.model_validate({"prompt": "x", field: name_of(member)})
        full = GenerateRequest.model_validate(
            {"prompt": "x", field: member.model_validate({}).model_dump()}
        )
        chosen = getattr(bare, field)
        assert chosen == getattr(full, field), member
        expected = split(chosen)[0] if field == "guidance" else chosen
        assert type(expected) is member
        assert expected == member.model_validate({})


def test_any_rule_goes_with_any_policy() -> None:
    for rule, policy in product(RULES, POLICIES):
        guidance = {"name": name_of(rule), "policy": {"name": name_of(policy)}}
        request = GenerateRequest.model_validate({"prompt": "x", "guidance": guidance})
        assert request.guidance is not None
        assert split(request.guidance) == (rule.model_validate({}), policy.model_validate({}))


def test_guidance_without_a_policy_always_evaluates() -> None:
    request = GenerateRequest.model_validate({"prompt": "x", "guidance": "cfg"})
    assert request.guidance is not None
    assert request.guidance.policy.name == "always"


def test_the_default_sampler_is_registered() -> None:
    assert default_sampler().name == DEFAULT_SAMPLER


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is null; it must be a string."),
        ({"prompt": 3}, "prompt", "prompt is 3; it must be a string."),
        (
            {"prompt": "a\0b"},
            "prompt",
            r"prompt has the character '\x00' at position 1; only text is allowed.",
        ),
        (
            {"prompt": "\ud800"},
            "prompt",
            r"prompt is '\ud800'; it must be valid Unicode.",
        ),
        (
            {"guidance": {"name": "cfg", "scale": "7"}},
            "guidance.scale",
            "guidance.scale is '7'; it must be a number.",
        ),
        (
            {"sampler": {"name": "ddim", "eta": True}},
            "sampler.eta",
            "sampler.eta is true; it must be a number.",
        ),
        (
            {"sampler": {"name": "unipc", "order": 4}},
            "sampler.order",
            "sampler.order is 4; it must be one of 1, 2, 3.",
        ),
        (
            {"spacing": {"name": "beta", "alpha": 0.1}},
            "spacing.alpha",
            "spacing.alpha is 0.1; it must be at least 0.3.",
        ),
        (
            {"spacing": {"name": "custom", "times": 5}},
            "spacing.times",
            "spacing.times is 5; it must be a list.",
        ),
        (
            {"spacing": {"name": "custom", "times": [999, "x"]}},
            "spacing.times.1",
            "spacing.times.1 is 'x'; it must be a number.",
        ),
        ({"steps": 0}, "steps", "steps is 0; it must be at least 1."),
        ({"steps": 2.5}, "steps", "steps is 2.5; it must be a whole number."),
        ({"steps": "20"}, "steps", "steps is '20'; it must be a whole number."),
        ({"steps": True}, "steps", "steps is true; it must be a whole number."),
        ({"n": 0}, "n", "n is 0; it must be at least 1."),
        ({"n": [1]}, "n", "n is a list; it must be a whole number."),
        ({"seed": -2}, "seed", "seed is -2; it must be at least 0."),
        ({"seed": 2**63}, "seed", f"seed is {2**63}; it must be at most {2**63 - 1}."),
        ({"width": 4}, "width", "width is 4; it must be at least 8."),
        ({"strength": 0}, "strength", "strength is 0; it must be greater than 0."),
        ({"strength": 1.5}, "strength", "strength is 1.5; it must be at most 1."),
        (
            {"strength": float("nan")},
            "strength",
            "strength is nan; it must be a finite number.",
        ),
        (
            {"output_format": "gif"},
            "output_format",
            "output_format is 'gif'; it must be one of 'png', 'jpeg', 'webp'.",
        ),
        ({"stream": 1}, "stream", "stream is 1; it must be true or false."),
        (
            {"guidance": {"name": "cfg", "scale": float("inf")}},
            "guidance.scale",
            "guidance.scale is inf; it must be a finite number.",
        ),
        (
            {"guidance": {"name": "apg", "eta": "much"}},
            "guidance.eta",
            "guidance.eta is 'much'; it must be a number.",
        ),
        (
            {"guidance": {"name": "cfg", "policy": {"name": "adaptive", "threshold": []}}},
            "guidance.policy.threshold",
            "guidance.policy.threshold is a list; it must be a number.",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": "pag"}},
            "guidance.perturbed",
            "guidance.perturbed is 'pag'; it must be a list.",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": ["pag"] * 4}},
            "guidance.perturbed",
            "guidance.perturbed has 4 entries; it must have at most 3.",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": [{"name": "pag", "layers": []}]}},
            "guidance.perturbed.0.layers",
            "guidance.perturbed.0.layers has 0 entries; it must have at least 1.",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": ["slg", {"name": "pag", "scale": "3"}]}},
            "guidance.perturbed.1.scale",
            "guidance.perturbed.1.scale is '3'; it must be a number.",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": [{"name": "pag", "layers": [3]}]}},
            "guidance.perturbed.0.layers.0",
            "guidance.perturbed.0.layers.0 is 3; it must be a string.",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": [{"name": "pag", "low": 3, "high": 1}]}},
            "guidance.perturbed.0",
            "guidance.perturbed.0: low is 3 and high 1; low must be below high.",
        ),
        (
            {"guidance": {"name": "cfg", "skip_tuning": {"bottom": 3}}},
            "guidance.skip_tuning.bottom",
            "guidance.skip_tuning.bottom is 3; it must be at most 2.",
        ),
        (
            {"sampler": {"eta": 1}},
            "sampler",
            f"sampler is an object without a 'name'; allowed are: "
            f"{', '.join(name_of(member) for member in SAMPLERS)}.",
        ),
        (
            {"sampler": 7},
            "sampler",
            f"sampler is neither a name nor an object with a 'name'; allowed are: "
            f"{', '.join(name_of(member) for member in SAMPLERS)}.",
        ),
    ],
    ids=str,
)
def test_one_sentence_says_what_is_wrong(fields: dict[str, Any], field: str, message: str) -> None:
    assert sentence(**fields) == (field, message)


@pytest.mark.parametrize(
    ("field", "members"), [("sampler", SAMPLERS), ("spacing", SPACINGS), ("guidance", RULES)]
)
def test_an_unknown_name_is_answered_with_the_known_ones(
    field: str, members: tuple[type[BaseModel], ...]
) -> None:
    allowed = ", ".join(name_of(member) for member in members)
    expected = field, f"{field} 'warp' is unknown; allowed are: {allowed}."
    assert sentence(**{field: "warp"}) == expected
    assert sentence(**{field: {"name": "warp"}}) == expected


@pytest.mark.parametrize(
    ("field", "name", "start"),
    [
        (
            "sampler",
            "DPM adaptive",
            "sampler 'DPM adaptive' has no equivalent here: its number of steps ",
        ),
        ("sampler", "DPM++2M", "sampler 'DPM++2M' is unknown (did you mean DPM++ 2M, DPM++ 2M SDE"),
        ("spacing", "Karas", "spacing 'Karas' is unknown (did you mean Karras?); allowed are: lea"),
    ],
)
def test_names_without_an_equal_are_explained(field: str, name: str, start: str) -> None:
    for value in (name, {"name": name}):
        named, message = sentence(**{field: value})
        assert named == field
        assert message.startswith(start)


def test_an_unknown_policy_is_named_by_its_path() -> None:
    field, message = sentence(guidance={"name": "cfg", "policy": "never"})
    assert field == "guidance.policy"
    assert message.startswith("policy 'never' is unknown; allowed are: always,")


def test_an_unknown_perturbation_is_named_by_its_path() -> None:
    field, message = sentence(guidance={"name": "cfg", "perturbed": ["pig"]})
    assert field == "guidance.perturbed.0"
    assert message.startswith("perturbed 'pig' is unknown; allowed are: pag,")


def test_any_perturbation_goes_beside_a_rule_and_settings_survive_their_own_answer() -> None:
    for kind in PERTURBATIONS:
        default = kind.model_validate({})
        guidance = {
            "name": "apg",
            "perturbed": [name_of(kind), default.model_dump(mode="json")],
            "skip_tuning": {"bottom": 0.7},
        }
        request = GenerateRequest.model_validate({"prompt": "x", "guidance": guidance})
        assert request.guidance is not None
        assert request.guidance.perturbed == (default, default)
        assert request.guidance.skip_tuning == SkipTuning(bottom=0.7)
        again = request.model_dump(mode="json", exclude_none=True)
        assert GenerateRequest.model_validate(again) == request


def test_unknown_particles_are_named_by_their_path() -> None:
    field, message = sentence(guidance={"name": "cfg", "particles": "smc"})
    assert field == "guidance.particles"
    assert message == "particles 'smc' is unknown; allowed are: fkc."


def test_a_missing_prompt_is_required() -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate({})
    assert explain(caught.value.errors(), GenerateRequest).message == "prompt is required."


@pytest.mark.parametrize(
    ("fields", "field", "hint"),
    [
        ({"step": 3}, "step", "did you mean steps?"),
        ({"init_images": ["x"]}, "init_images", "did you mean image?"),
        ({"enable_hr": True}, "enable_hr", "did you mean hires?"),
        ({"subseed": 3}, "subseed", "did you mean variation?"),
        (
            {"variation": {"strength": 0.2, "sead": 3}},
            "variation.sead",
            "did you mean seed?",
        ),
        ({"guidance": {"name": "apg", "scael": 3}}, "guidance.scael", "did you mean scale?"),
        ({"guidance": {"name": "cfg", "polcy": 3}}, "guidance.polcy", "did you mean policy?"),
        ({"sampler": {"name": "ddim", "etta": 3}}, "sampler.etta", "did you mean eta?"),
        (
            {"guidance": {"name": "cfg", "policy": {"name": "adaptive", "thresh": 1}}},
            "guidance.policy.thresh",
            "did you mean threshold?",
        ),
        (
            {"guidance": {"name": "cfg", "perturbed": [{"name": "pag", "scael": 1}]}},
            "guidance.perturbed.0.scael",
            "did you mean scale?",
        ),
        (
            {"guidance": {"name": "cfg", "perturbd": []}},
            "guidance.perturbd",
            "did you mean perturbed?",
        ),
        (
            {"guidance": {"name": "cfg", "skip_tuning": {"botom": 1}}},
            "guidance.skip_tuning.botom",
            "did you mean bottom?",
        ),
        (
            {"guidance": {"name": "cfg", "negtome": {"treshold": 1}}},
            "guidance.negtome.treshold",
            "did you mean threshold?",
        ),
        (
            {"guidance": {"name": "cfg", "particles": {"name": "fkc", "bond": 1}}},
            "guidance.particles.bond",
            "did you mean bound?",
        ),
    ],
    ids=str,
)
def test_an_unknown_field_is_refused_with_its_neighbour(
    fields: dict[str, Any], field: str, hint: str
) -> None:
    named, message = sentence(**fields)
    assert named == field
    assert message.startswith(f"{field} is not a known field ({hint}); allowed are: ")


def test_the_schema_shows_every_parameter() -> None:
    schema = GenerateRequest.model_json_schema()
    for field, member in REGISTRIES:
        shown = json.dumps(schema["properties"][field])
        name = f"{member.__name__}Guidance" if field == "guidance" else member.__name__
        assert f'"#/$defs/{name}"' in shown
        assert f'"{name_of(member)}"' in shown
        for parameter, info in member.model_fields.items():
            described = schema["$defs"][name]["properties"][parameter]
            # Tuples are lists in JSON.
            assert described["default"] == json.loads(json.dumps(info.default)), parameter
            assert parameter == "name" or described["description"] == info.description, parameter


class Leaving(DDIM, frozen=True):
    name: Literal["leaving"] = "leaving"  # type: ignore[assignment]
    level: float = 1.0

    @field_validator("level")
    @classmethod
    def _leave(cls, value: float) -> float:
        sys.exit("not told to clients")


def test_a_validator_of_a_plug_in_that_exits_costs_its_own_request_alone() -> None:
    choosing = TypeAdapter(choice("sampler", (Leaving, *SAMPLERS)))
    assert choosing.validate_python("leaving") == Leaving()
    with pytest.raises(WeftError, match=r"^A plug-in failed with SystemExit; the server's log"):
        choosing.validate_python({"name": "leaving", "level": 2.0})
