"""What a request may say: every field with its range, default and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, create_model
from pydantic_core import PydanticCustomError

from guidance import (
    RULES,
    ClassifierGuidance,
    FeynmanKac,
    NegToMe,
    Perturbation,
    Policy,
    Rule,
    SkipTuning,
)
from guidance.parts import PARTS, Part
from samplers import SAMPLERS, SPACINGS, Sampler, Spacing
from server.image_codec import OutputFormat
from server.requests.aliases import sampler_elsewhere, spacing_elsewhere
from server.requests.choice import choice, name_of

__all__ = [
    "CHOICES",
    "DEFAULT_SAMPLER",
    "DEFAULT_STEPS",
    "MAX_SEED",
    "SPACING_BY_NAME",
    "GenerateRequest",
    "Guidance",
    "ResolvedRequest",
    "default_guidance",
    "default_sampler",
    "split",
]

DEFAULT_STEPS: Final = 25
DEFAULT_SAMPLER: Final = "dpm_solver_pp"
DEFAULT_GUIDANCE: Final = {"name": "apg", "scale": 4.0}
"""As right as plain guidance of that scale, and nearer the truth's looks (docs/guidance.md)."""
GUIDANCE_OF_STATISTICS: Final = {"name": "cfg", "scale": 4.0}
"""Where the sampler goes by statistics of the model, which are those of plain guidance."""
MAX_SEED: Final = 2**63 - 1

if TYPE_CHECKING:
    SamplerChoice = Sampler
    SpacingChoice = Spacing

    class Guidance(Rule, frozen=True):
        """A rule's own fields, and a field for each of `guidance.parts.PARTS`."""

        policy: Policy
        perturbed: tuple[Perturbation, ...]
        classifier: ClassifierGuidance | None
        skip_tuning: SkipTuning | None
        particles: FeynmanKac | None
        negtome: NegToMe | None
else:
    SamplerChoice = choice("sampler", SAMPLERS, sampler_elsewhere)
    SpacingChoice = choice("spacing", SPACINGS, spacing_elsewhere)

    def _field_of(part: Part) -> tuple[Any, Any]:
        """Type and default of a part of `guidance`."""
        one = choice(part.field, part.kinds) if part.named else part.kinds[0]
        about = {"default": part.left_out, "description": part.description}
        if part.many:
            return tuple[one, ...], Field(max_length=part.most, strict=False, **about)
        return (one if part.default is not None else one | None), Field(**about)

    _Parts = {part.field: _field_of(part) for part in PARTS}

    def _with_parts(rule: type[Rule]) -> type[Rule]:
        name = f"{rule.__name__}Guidance"
        return create_model(name, __base__=rule, __doc__=rule.__doc__, **_Parts)

    Guidance = choice("guidance", tuple(_with_parts(rule) for rule in RULES))

_GUIDANCE: TypeAdapter[Guidance] = TypeAdapter(Guidance)
_RULES = {name_of(member): member for member in RULES}
SPACING_BY_NAME: Final = {name_of(member): member for member in SPACINGS}

CHOICES: Final[Mapping[str, Mapping[str, type[BaseModel]]]] = {
    "sampler": {name_of(member): member for member in SAMPLERS},
    "spacing": SPACING_BY_NAME,
    "guidance": _RULES,
    **{part.field: part.by_name for part in PARTS if part.named},
}
"""Classes by field and name, for error sentences about the fields inside them."""


def _printable(text: str) -> str:
    for position, character in enumerate(text):
        if (character < " " and character not in "\t\n\r") or "\ud800" <= character <= "\udfff":
            raise PydanticCustomError(
                "unprintable",
                "has the character {character} at {position}; only text is allowed",
                {"character": repr(character), "position": position},
            )
    return text


Prompt = Annotated[str, AfterValidator(_printable)]
Count = Annotated[int, Field(strict=True)]


class GenerateRequest(BaseModel):
    """One request for pictures of one prompt.

    What is left out takes the model's default; the answer's `settings` say what that was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: Prompt = Field(description="What the picture shows.", examples=["a red circle"])
    negative_prompt: Prompt | None = Field(
        default=None,
        description="What guidance steers away from; by default the model's unconditional, which "
        "for some models is not the empty text.",
    )
    model: str | None = Field(
        default=None, max_length=256, description="A hosted model; the first one by default."
    )
    width: Count | None = Field(
        default=None, ge=8, le=16384, description="Pixels; the model's own size by default."
    )
    height: Count | None = Field(
        default=None, ge=8, le=16384, description="Pixels; the model's own size by default."
    )
    steps: Count | None = Field(
        default=None, ge=1, description=f"Sampler steps; {DEFAULT_STEPS} by default."
    )
    seed: Count | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Of the first image; image i has seed + i. Random, and reported, by default.",
    )
    n: Count = Field(default=1, ge=1, description="Images, each with a seed of its own.")
    sampler: SamplerChoice | None = Field(
        default=None, description=f"How the noise is removed; `{DEFAULT_SAMPLER}` by default."
    )
    spacing: SpacingChoice | None = Field(
        default=None, description="How the steps are laid out; the sampler's own by default."
    )
    guidance: Guidance | None = Field(
        default=None,
        description="How the prompt is enforced: the fields of a rule, and optionally "
        f"{', '.join(f'`{part.field}`' for part in PARTS)}; "
        f"`{DEFAULT_GUIDANCE}` by default, and `{GUIDANCE_OF_STATISTICS}` with a sampler that uses "
        "statistics of the model.",
    )
    image: str | None = Field(
        default=None,
        repr=False,
        description="A picture to start from (PNG, JPEG or WebP as base64 or data URI), "
        "resampled to `width` x `height`; its own size by default.",
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        strict=True,
        description="Share of the steps that `image` goes through: 0.75 by default, 1 with a mask.",
    )
    mask: str | None = Field(
        default=None,
        repr=False,
        description="Where `image` is repainted (white) and kept (black), resampled alike.",
    )
    reference: str | None = Field(
        default=None,
        repr=False,
        description="A picture that the images keep away from, by `guidance.negtome`, resampled "
        "alike.",
    )
    output_format: OutputFormat = Field(default="png", description="Of the pictures.")
    stream: bool = Field(default=False, strict=True, description="Answer with server-sent events.")


class ResolvedRequest(BaseModel):
    """A request whose every default is filled in; pictures that were sent are left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    negative_prompt: str | None = None
    model: str
    width: int
    height: int
    steps: int
    seed: int
    n: int
    sampler: SamplerChoice
    spacing: SpacingChoice
    guidance: Guidance
    strength: float | None
    output_format: OutputFormat
    stream: bool

    def settings(self) -> dict[str, Any]:
        """JSON that makes the same pictures when posted back.

        What started from a picture is refused until that picture is sent again.
        """
        return self.model_dump(mode="json", exclude={"stream"}, exclude_none=True)


def default_sampler() -> Sampler:
    """The sampler of a request that names none."""
    return next(
        sampler for sampler in SAMPLERS if name_of(sampler) == DEFAULT_SAMPLER
    ).model_validate({})


def default_guidance(sampler: Sampler) -> Guidance:
    """The guidance of a request that names none.

    Args:
        sampler: of the request.
    """
    named = GUIDANCE_OF_STATISTICS if sampler.uses_statistics else DEFAULT_GUIDANCE
    return _GUIDANCE.validate_python(named)


def split(guidance: Guidance) -> tuple[Rule, Policy]:
    """The rule and the policy that a request's guidance names."""
    rule = _RULES[guidance.name]
    fields = {field: getattr(guidance, field) for field in rule.model_fields}
    return rule.model_validate(fields), guidance.policy
