"""Fields of a request, with their ranges, defaults and descriptions."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, create_model
from pydantic_core import PydanticCustomError

from guidance import (
    RULES,
    STEP_CACHES,
    CFGNorm,
    ClassifierGuidance,
    FeynmanKac,
    FreeU,
    NegToMe,
    Perturbation,
    Policy,
    Rule,
    SkipTuning,
    StepCache,
)
from guidance.parts import PARTS, Part
from samplers import SAMPLERS, SPACINGS, Sampler, Spacing
from server.decoding.sizing import ResizeMode
from server.image_codec import OutputFormat
from server.requests.adapters import MAX_ADAPTERS, AdapterChoices
from server.requests.choice import choice, name_of
from server.requests.controls import MAX_CONTROLS, ControlChoice, ControlSettings
from server.requests.foreign_names import why_no_sampler, why_no_spacing
from server.requests.hires import Hires
from server.requests.image_prompts import MAX_IMAGE_PROMPTS, ImagePromptChoice, ImagePromptSettings
from server.requests.numbers import Count
from server.requests.reading import DEFAULT_RULE, Readable
from server.requests.reference_images import MAX_REFERENCES
from server.requests.start_noise import MAX_SEED, NoiseSize, VariationChoice
from server.requests.upload import Upload
from server.settings import PROMPT_BYTES_CEILING

__all__ = [
    "CHOICES",
    "DEFAULT_RESIZE_MODE",
    "DEFAULT_SAMPLER",
    "DEFAULT_STEPS",
    "SPACING_BY_NAME",
    "GenerateRequest",
    "Guidance",
    "MaskContent",
    "ResolvedRequest",
    "check_printable",
    "default_guidance",
    "default_sampler",
    "guidance_of",
    "merged",
    "split",
]

MaskContent: TypeAlias = Literal["original", "fill", "latent_noise", "latent_nothing"]

DEFAULT_STEPS: Final = 25
DEFAULT_SAMPLER: Final = "dpm_solver_pp"
DEFAULT_RESIZE_MODE: Final[ResizeMode] = "stretch"
DEFAULT_GUIDANCE: Final = {"name": DEFAULT_RULE, "scale": 4.0}
"""As accurate as plain guidance at that scale, and closer to the data in appearance
(docs/guidance.md)."""
GUIDANCE_OF_STATISTICS: Final = {"name": "cfg", "scale": 4.0}
"""Default for samplers planned with model statistics, which are measured under plain guidance."""

if TYPE_CHECKING:
    SamplerChoice = Sampler
    SpacingChoice = Spacing
    StepCacheChoice = StepCache

    class Guidance(Rule, frozen=True):
        """A rule's own fields, and a field for each of `guidance.parts.PARTS`."""

        policy: Policy
        perturbed: tuple[Perturbation, ...]
        classifier: ClassifierGuidance | None
        skip_tuning: SkipTuning | None
        freeu: FreeU | None
        particles: FeynmanKac | None
        negtome: NegToMe | None
        cfg_norm: CFGNorm | None
else:
    SamplerChoice = choice("sampler", SAMPLERS, why_no_sampler)
    SpacingChoice = choice("spacing", SPACINGS, why_no_spacing)
    StepCacheChoice = choice("cache", STEP_CACHES)

    def _field_of(part: Part) -> tuple[Any, Any]:
        """Return the type and default of a part of `guidance`."""
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
    "cache": {name_of(member): member for member in STEP_CACHES},
    **{part.field: part.by_name for part in PARTS if part.named},
}
"""Classes by field and name, for error sentences about the fields inside them."""


def check_printable(text: str) -> str:
    """Return a text if it is printable.

    Raises:
        PydanticCustomError: the text has a control character or half a surrogate pair.
    """
    for position, character in enumerate(text):
        if (character < " " and character not in "\t\n\r") or "\ud800" <= character <= "\udfff":
            raise PydanticCustomError(
                "unprintable",
                "has the character {character} at position {position}; only text is allowed",
                {"character": repr(character), "position": position},
            )
    return text


Prompt = Annotated[str, Field(max_length=PROMPT_BYTES_CEILING), AfterValidator(check_printable)]


class GenerateRequest(Readable):
    """One request for images of one prompt.

    Fields that are left out take their defaults; the response's `settings` contain all of them.
    """

    renamed = True

    prompt: Prompt = Field(description="Describes the image.", examples=["a red circle"])
    negative_prompt: Prompt | None = Field(
        default=None,
        description="Describes what guidance steers away from. Default: the model's unconditional "
        "prediction, which for some models is not that of the empty text.",
    )
    prompt_syntax: Literal["automatic1111"] | None = Field(
        default=None,
        description="How prompts are read, including those in `guidance`: `automatic1111` reads "
        "`(word:1.2)`, `(word)` and `[word]` as weights, `[from:to:when]` and `[a|b]` as texts "
        "that change during the run, and `BREAK` as the start of a new chunk, and encodes prompts "
        "that are too long for the encoder in chunks; for U-Net models. Default: plain text.",
    )
    clip_skip: Count | None = Field(
        default=None,
        ge=1,
        description="Which layer of its CLIP text encoders the model reads, counted from the last, "
        "as in AUTOMATIC1111: 1 is the last, 2 the one before it. Applies to all texts of the "
        "request. Default: the model's own, the first of its `clip_skips` in the catalog, which is "
        "1 for Stable Diffusion 1.x and 2 for XL.",
    )
    model: str | None = Field(
        default=None, max_length=256, description="Name of a hosted model. Default: the first one."
    )
    autoencoder: Literal["full", "tiny"] = Field(
        default="full",
        description="Which of the model's autoencoders encodes and decodes pictures: `tiny` takes "
        "a fraction of the time and shows less detail; for models whose entry in the catalog has a "
        "`tiny_vae`.",
    )
    width: Count | None = Field(
        default=None, ge=8, le=16384, description="Width in pixels. Default: the model's own."
    )
    height: Count | None = Field(
        default=None, ge=8, le=16384, description="Height in pixels. Default: the model's own."
    )
    steps: Count | None = Field(
        default=None,
        ge=1,
        description="Number of sampler steps. Default: that of the model's entry in the catalog, "
        f"usually {DEFAULT_STEPS}.",
    )
    seed: Count | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the first image; image i has seed + i. Default, and with -1: random, "
        "and reported in the response.",
    )
    n: Count = Field(default=1, ge=1, description="Number of images.")
    variation: VariationChoice | None = Field(
        default=None,
        description="Variations of the image of `seed`, whose start noise is rotated towards that "
        "of other seeds. Default: image i has the noise of seed + i.",
    )
    noise_size: NoiseSize | None = Field(
        default=None,
        description="Size of another picture, whose start noise is used in the middle of the "
        "images so that they resemble it at another size. Default: the images' own size.",
    )
    sampler: SamplerChoice | None = Field(
        default=None,
        description="How the noise is removed; names of AUTOMATIC1111, ComfyUI and diffusers are "
        "accepted too. Default: that of the model's entry in the catalog, usually "
        f"`{DEFAULT_SAMPLER}`.",
    )
    spacing: SpacingChoice | None = Field(
        default=None,
        description="At which noise levels the steps are. Default: the model's for its default "
        "sampler, if it has one, otherwise the sampler's own.",
    )
    guidance: Guidance | None = Field(
        default=None,
        description="How the images are made to follow the prompt: the name and fields of a rule, "
        "and optionally "
        f"{', '.join(f'`{part.field}`' for part in PARTS)}. Without a name, the fields go to the "
        "default rule. "
        "Default: that of the model's entry in the catalog, usually "
        f"`{json.dumps(DEFAULT_GUIDANCE)}`, or `{json.dumps(GUIDANCE_OF_STATISTICS)}` with a "
        "sampler that uses model statistics.",
    )
    cache: StepCacheChoice | None = Field(
        default=None,
        description="Skips evaluations of the network whose outputs are predicted to be nearly "
        "those of the last one, which changes the image a little. Default: no evaluation is "
        "skipped.",
    )
    adapters: AdapterChoices = Field(
        default=(),
        max_length=MAX_ADAPTERS,
        description="LoRA adapters to apply to the model, added up: names of the model's adapters "
        "in the catalog, or objects with a `name` and a `weight`.",
    )
    image: Upload | None = Field(
        default=None,
        repr=False,
        description="An image to start from: PNG, JPEG or WebP, as base64 or a base64 data URI. It "
        "is resized to `width` x `height`. If one of them is left out, it follows from the image's "
        "proportions; without both the image keeps its size, rounded to one that the model draws.",
    )
    resize_mode: ResizeMode | None = Field(
        default=None,
        description="How to fit an image of other proportions: stretch distorts it, crop cuts it "
        "around the middle, fill fits it in and repeats its edges. Default: stretch.",
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        strict=True,
        description="Share of the steps that are run from `image`. Default: 0.75, or 1 with a mask "
        "or a single step.",
    )
    mask: Upload | None = Field(
        default=None,
        repr=False,
        description="Where `image` is repainted (white) and where it is kept (black), resampled "
        "like it.",
    )
    mask_content: MaskContent | None = Field(
        default=None,
        description="What the repainted part starts from: `original` is the image there, `fill` "
        "the colours around it, `latent_noise` noise and `latent_nothing` nothing in place of its "
        "latents. It matters more at lower strengths. Default: original.",
    )
    reference: Upload | None = Field(
        default=None,
        repr=False,
        description="An image that the results move away from, with `guidance.negtome`; resampled "
        "like `image`.",
    )
    controls: tuple[ControlChoice, ...] = Field(
        default=(),
        max_length=MAX_CONTROLS,
        description="ControlNets that steer the images, added up: names of the model's ControlNets "
        "in the catalog, each with the picture that it reads.",
    )
    image_prompts: tuple[ImagePromptChoice, ...] = Field(
        default=(),
        max_length=MAX_IMAGE_PROMPTS,
        description="Pictures that the images should resemble in addition to the prompt, added up: "
        "names of the model's IP-Adapters in the catalog, each with its picture.",
    )
    reference_images: tuple[Upload, ...] = Field(
        default=(),
        max_length=MAX_REFERENCES,
        repr=False,
        description="Pictures that the prompt refers to, in the order in which it numbers them: it "
        "says what to change in them, or what to take from them. PNG, JPEG or WebP, as base64 or "
        "base64 data URIs, for models whose entry in the catalog has `reference_images`. Each is "
        "reduced to a megapixel if it has more. Width and height default to those of the first "
        "one.",
    )
    hires: Hires | None = Field(
        default=None,
        description="A second run that draws each image again at a larger size, from the result of "
        "the first run; `{}` doubles the size. Each image counts as two. Default: a single run.",
    )
    output_format: OutputFormat = Field(default="png", description="File format of the images.")
    response_format: Literal["b64_json", "url"] = Field(
        default="b64_json",
        description="Whether the response contains the images in base64, or a URL of each, which "
        "works without a key and for a limited time.",
    )
    stream: bool = Field(
        default=False,
        strict=True,
        description="Whether to respond with a stream of server-sent events.",
    )
    priority: Literal["interactive", "batch"] = Field(
        default="interactive",
        description="Whether somebody is waiting for the images: batch requests run after "
        "interactive ones, but are not postponed forever.",
    )


class ResolvedRequest(BaseModel):
    """A request with every default filled in, without the images that were sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    negative_prompt: str | None = None
    prompt_syntax: Literal["automatic1111"] | None = None
    clip_skip: int | None = None
    model: str
    autoencoder: Literal["tiny"] | None = None
    width: int
    height: int
    steps: int
    seed: int
    n: int
    variation: VariationChoice | None = None
    noise_size: NoiseSize | None = None
    sampler: SamplerChoice
    spacing: SpacingChoice
    guidance: Guidance
    cache: StepCacheChoice | None = None
    adapters: AdapterChoices = ()
    controls: tuple[ControlSettings, ...] = ()
    image_prompts: tuple[ImagePromptSettings, ...] = ()
    reference_images: int | None = None
    strength: float | None
    resize_mode: ResizeMode | None = None
    mask_content: MaskContent | None = None
    hires: Hires | None = None
    output_format: OutputFormat
    stream: bool
    priority: Literal["interactive", "batch"] = "interactive"

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Width and height of the images."""
        return (self.width, self.height) if self.hires is None else self.hires.size

    def settings(self) -> dict[str, Any]:
        """Return JSON that makes the same images when posted back.

        If the request used images, as a start, for ControlNets or as image prompts, these must be
        sent again; without them it is refused.
        """
        return self.model_dump(mode="json", exclude={"stream", "priority"}, exclude_none=True)


def default_sampler() -> Sampler:
    """Return the sampler of a request that leaves it out, for models without their own defaults."""
    return next(
        sampler for sampler in SAMPLERS if name_of(sampler) == DEFAULT_SAMPLER
    ).model_validate({})


def default_guidance(sampler: Sampler) -> Guidance:
    """Return the guidance of a request that leaves it out, for models without their own defaults.

    Args:
        sampler: sampler of the request.
    """
    named = GUIDANCE_OF_STATISTICS if sampler.uses_statistics else DEFAULT_GUIDANCE
    return _GUIDANCE.validate_python(named)


def guidance_of(rule: Rule, policy: Policy, cfg_norm: CFGNorm | None = None) -> Guidance:
    """Return a request's guidance that consists of a rule, a policy and a norm only."""
    norm = None if cfg_norm is None else cfg_norm.model_dump()
    given = {**rule.model_dump(), "policy": policy.model_dump(), "cfg_norm": norm}
    return _GUIDANCE.validate_python(given)


def merged(default: Guidance, given: Guidance, fields: Collection[str]) -> Guidance:
    """Return a request's guidance with some fields taken from another one."""
    return _GUIDANCE.validate_python(default.model_dump() | given.model_dump(include=set(fields)))


def split(guidance: Guidance) -> tuple[Rule, Policy]:
    """Return the rule and the policy of a request's guidance."""
    rule = _RULES[guidance.name]
    fields = {field: getattr(guidance, field) for field in rule.model_fields}
    return rule.model_validate(fields), guidance.policy
