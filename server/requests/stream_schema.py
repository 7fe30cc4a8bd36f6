"""Settings of a live stream, with their ranges, defaults and descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from server.errors import MalformedBody
from server.image_codec import OutputFormat
from server.models.blend import Blend, BlendKind
from server.requests.adapters import AdapterChoices
from server.requests.checks.shape import check_shape
from server.requests.image_prompts import ImagePromptChoice
from server.requests.messages import explain
from server.requests.reading import Readable
from server.requests.reference_images import MAX_REFERENCES
from server.requests.schema import (
    Count,
    GenerateRequest,
    Guidance,
    Prompt,
    SamplerChoice,
    SpacingChoice,
)
from server.requests.upload import Upload

__all__ = [
    "IMAGE_FIELDS",
    "OWN_FIELDS",
    "BlendedPrompt",
    "SimilarityFilter",
    "StreamSettings",
    "message_fields",
    "read_settings",
]

MAX_PROMPTS: Final = 8
MAX_TRANSITION_FRAMES: Final = 600
MAX_SKIPPED: Final = 1000
MAX_SEED_STEP: Final = 2**32

IMAGE_FIELDS: Final = ("image_prompts", "reference_images")
"""Fields with pictures, which complement the prompt of every frame."""

PICTURES: Final = frozenset({"image_prompts.image", "image_prompts.mask", "reference_images"})
"""Fields of a message that hold pictures, in base64."""


class BlendedPrompt(BaseModel):
    """One of several prompts that are blended."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: Prompt = Field(description="Describes the image.")
    weight: float = Field(
        default=1.0,
        ge=0,
        le=100,
        strict=True,
        description="Weight of this prompt, relative to the sum of all weights.",
    )


class SimilarityFilter(BaseModel):
    """Skips input frames that are similar to the last processed one (arXiv 2312.12491)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    threshold: float = Field(
        default=0.98,
        ge=0,
        lt=1,
        strict=True,
        description="Cosine similarity of two frames from which the second may be skipped.",
    )
    max_skip: Count = Field(
        default=10, ge=1, le=MAX_SKIPPED, description="Maximum number of frames skipped in a row."
    )


def _listed(value: Any) -> Any:
    """Convert a single text to a list of one weighted prompt."""
    if isinstance(value, str):
        return ({"text": value},)
    if isinstance(value, list | tuple):
        return value
    raise PydanticCustomError("sentence", "prompt must be a string or a list of weighted prompts.")


def _weighty(prompts: tuple[BlendedPrompt, ...]) -> tuple[BlendedPrompt, ...]:
    if prompts and not any(one.weight for one in prompts):
        raise PydanticCustomError(
            "sentence", "prompt has no weight above 0; give one of its texts a weight."
        )
    return prompts


def _as_in_requests(field: str) -> Any:
    """Return the field of the same name of :class:`GenerateRequest`."""
    return GenerateRequest.model_fields[field]


Prompts = Annotated[
    tuple[BlendedPrompt, ...],
    Field(min_length=1, max_length=MAX_PROMPTS),
    BeforeValidator(_listed),
    AfterValidator(_weighty),
]


class StreamSettings(Readable):
    """Settings of a live stream; fields that are left out take their defaults."""

    prompt: Prompts = Field(
        description="Describes the images: a string, or a list of weighted prompts."
    )
    negative_prompt: Prompt | None = _as_in_requests("negative_prompt")
    clip_skip: Count | None = _as_in_requests("clip_skip")
    model: str | None = _as_in_requests("model")
    autoencoder: Literal["full", "tiny"] = _as_in_requests("autoencoder")
    width: Count | None = _as_in_requests("width")
    height: Count | None = _as_in_requests("height")
    steps: Count | None = _as_in_requests("steps")
    seed: Count | None = _as_in_requests("seed")
    sampler: SamplerChoice | None = _as_in_requests("sampler")
    spacing: SpacingChoice | None = _as_in_requests("spacing")
    guidance: Guidance | None = _as_in_requests("guidance")
    adapters: AdapterChoices = _as_in_requests("adapters")
    image_prompts: tuple[ImagePromptChoice, ...] = _as_in_requests("image_prompts")
    reference_images: tuple[Upload, ...] = Field(
        default=(),
        max_length=MAX_REFERENCES,
        repr=False,
        description="Pictures that the prompt refers to, for models whose entry in the catalog has "
        "`reference_images`. With source `references`, they come after the input frame.",
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        strict=True,
        description="Share of the steps that are run from an input frame. Default: 0.75, or 1 with "
        "a single step.",
    )
    output_format: OutputFormat = Field(
        default="jpeg", description="File format of the output frames."
    )
    source: Literal["frames", "references", "text"] = Field(
        default="frames",
        description="How output frames use input frames: `frames` starts each run from one, "
        "`references` reads it as the first reference image, and `text` uses none.",
    )
    seed_step: Count = Field(
        default=0,
        ge=0,
        le=MAX_SEED_STEP,
        description="Added to the seed for each output frame.",
    )
    blend: BlendKind = Field(
        default="linear",
        description="How weighted prompts, and the two prompts of a transition, are mixed.",
    )
    transition_frames: Count = Field(
        default=0,
        ge=0,
        le=MAX_TRANSITION_FRAMES,
        description="Frames over which a new prompt replaces the old one.",
    )
    similarity_filter: SimilarityFilter | None = Field(
        default=None, description="Skips input frames that are similar to the last one processed."
    )
    max_fps: float = Field(
        default=30.0, gt=0, le=1000, strict=True, description="Maximum output frames per second."
    )
    in_flight: Count | None = Field(
        default=None,
        ge=1,
        description="Maximum frames of this session in the engine at once. Default: one for each "
        "stage, plus two.",
    )
    paused: bool = Field(
        default=False,
        strict=True,
        description="Whether to pause, so that no further frame is taken in.",
    )
    stats_s: float | None = Field(
        default=None,
        ge=0.1,
        le=60,
        strict=True,
        description="Seconds between two messages with statistics. Default: none are sent.",
    )

    @property
    def prompt_or_blend(self) -> str | Blend:
        """The prompt or blend that the network is conditioned on."""
        if len(self.prompt) == 1:
            return self.prompt[0].text
        return Blend(tuple((one.text, one.weight) for one in self.prompt), self.blend)

    def request(self) -> GenerateRequest:
        """Return a request for a single image with these settings and only the first prompt."""
        fields = {
            name: getattr(self, name) for name in GenerateRequest.model_fields if name in _SHARED
        }
        return GenerateRequest(prompt=self.prompt[0].text, **fields).read_as(self.reading)

    def own(self) -> dict[str, Any]:
        """Return JSON of the prompt and of the fields in `OWN_FIELDS`."""
        alone = len(self.prompt) == 1
        prompt = self.prompt[0].text if alone else [one.model_dump() for one in self.prompt]
        return {"prompt": prompt} | self.model_dump(mode="json", include=OWN_FIELDS)


_SHARED: Final = frozenset(StreamSettings.model_fields) & frozenset(
    GenerateRequest.model_fields
) - {"prompt"}
OWN_FIELDS: Final = set(StreamSettings.model_fields) - _SHARED - {"prompt"}
"""Fields that a request for a single image does not have."""


def message_fields(text: str) -> dict[str, Any]:
    """Parse the fields of a JSON message.

    Raises:
        MalformedBody: the message is not a JSON object.
        InvalidRequest: something in it is larger than any setting.
    """
    try:
        fields = from_json(text)
    except ValueError as error:
        raise MalformedBody(None, f"The message is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise MalformedBody(None, "The message must be a JSON object of settings.")
    check_shape(fields, PICTURES)
    return fields


def read_settings(fields: Mapping[str, Any]) -> StreamSettings:
    """Validate the fields of a stream.

    Raises:
        InvalidRequest: a field is unknown or has an invalid value.
    """
    try:
        return StreamSettings.model_validate(fields)
    except ValidationError as error:
        raise explain(error.errors(), StreamSettings) from None
