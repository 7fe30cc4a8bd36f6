"""Translation of OpenAI's image requests into Weft's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.decoding.picture import MaskForm
from server.errors import InvalidRequest
from server.requests.numbers import Count
from server.requests.reference_images import MAX_REFERENCES
from server.requests.schema import GenerateRequest
from server.requests.upload import Upload

__all__ = ["ImageEdit", "ImageGeneration", "request_of", "with_referenced_images"]

_THEIR_MODELS: Final = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]*")
_ANSWERED_BY_URL: Final = re.compile(r"dall-e[\w.-]*")
"""OpenAI's models whose images are returned as URLs by default."""

_WITHOUT_EFFECT: Final = ("quality", "moderation", "style", "output_compression", "input_fidelity")
_NEUTRAL: Final = {
    "quality": ("auto",),
    "moderation": ("auto",),
    "output_compression": (100,),
}
"""Neutral values, about which no warning is needed."""

_EMPTY_IS_ABSENT: Final = (
    "model",
    "response_format",
    "output_format",
    "background",
    "quality",
    "style",
    "moderation",
    "input_fidelity",
    "user",
)
"""Fields that some clients send as an empty string when their users leave them out."""


class ImageGeneration(GenerateRequest):
    """A request of OpenAI's `POST /v1/images/generations`.

    Every field of `POST /v1/generate` may be combined with OpenAI's own; the SDK sends them from
    `extra_body`. Unknown fields are ignored and named in the response's `warnings`.
    """

    model_config = ConfigDict(extra="allow")

    size: str | None = Field(
        default=None,
        description="Width and height, `512x512`; `auto` is the model's own size, or the image's.",
    )
    background: Literal["auto", "opaque"] = Field(
        default="auto", description="Images are opaque; `transparent` is refused."
    )
    partial_images: Count = Field(
        default=0, ge=0, le=3, description="Previews in a stream, before the image itself."
    )
    quality: str = Field(default="auto", max_length=60, description="Has no effect.")
    moderation: str = Field(default="auto", max_length=60, description="Has no effect.")
    style: str | None = Field(default=None, max_length=60, description="Has no effect.")
    output_compression: Count = Field(default=100, ge=0, le=100, description="Has no effect.")
    user: str | None = Field(default=None, max_length=512, description="Ignored.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="Ignored.")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, data: Any) -> Any:
        """Drop null and empty values, which OpenAI's clients send for defaults."""
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and not (value == "" and name in _EMPTY_IS_ABSENT)
        }


class ImageEdit(ImageGeneration):
    """A request of OpenAI's `POST /v1/images/edits`, as a multipart form or as JSON.

    JSON may have `images` in place of `image`: a list of objects whose `image_url` is a data URL.
    `mask` may be such an object too.
    """

    image: Upload | None = Field(
        repr=False,
        description="The image to edit: PNG, JPEG or WebP. Without a mask, its own transparent "
        "pixels are repainted; an opaque image is edited as a whole: models that read "
        "`reference_images` follow the prompt and accept several images, and others use "
        "`strength`.",
    )
    mask: Upload | None = Field(
        default=None,
        repr=False,
        description="Transparent where the image is repainted. A mask without an alpha channel is "
        "white there.",
    )
    input_fidelity: str | None = Field(default=None, max_length=60, description="Has no effect.")

    @field_validator("mask", mode="after")
    @classmethod
    def _repaint_what_is_clear(cls, mask: Upload | None) -> Upload | None:
        return None if mask is None else mask.as_mask(MaskForm("clear"))

    @model_validator(mode="before")
    @classmethod
    def _take_several_images(cls, data: Any) -> Any:
        """Accept a list of images, which the SDK sends as `image[]`, as reference images.

        Until the model is known, it is unknown whether it reads these, so the first image is also
        kept as `image`.
        """
        images = data.get("image") if isinstance(data, dict) else None
        if not isinstance(images, list) or not images:
            return data
        if len(images) > MAX_REFERENCES:
            raise PydanticCustomError(
                "sentence",
                "image has {count} images; at most {most} are allowed.",
                {"count": len(images), "most": MAX_REFERENCES, "field": "image"},
            )
        several = {"reference_images": images} if len(images) > 1 else {}
        if several and data.get("reference_images"):
            raise PydanticCustomError(
                "sentence",
                "image has {count} images, but reference_images is set too; send all of them as "
                "image.",
                {"count": len(images), "field": "image"},
            )
        return {**data, **several, "image": images[0]}


def with_referenced_images(body: Any) -> Any:
    """Return the JSON of an edit with its images in place of OpenAI's references to images.

    A reference is an object with `image_url` or `file_id` (``ImageRefParam`` in OpenAI's
    specification); only data URLs are accepted, because this server fetches and stores nothing.

    Args:
        body: parsed JSON; without references it is returned unchanged.

    Raises:
        InvalidRequest: a reference is something else than a data URL, or there are none.
    """
    if not isinstance(body, dict):
        return body
    changed: dict[str, Any] = dict(body)
    if isinstance(mask := body.get("mask"), dict):
        changed["mask"] = _referenced(mask, "mask")
    images = changed.pop("images", None)
    if images is None:
        return changed
    if not isinstance(images, list) or not 0 < len(images) <= MAX_REFERENCES:
        raise InvalidRequest(
            "images", f"images must be a list of 1 to {MAX_REFERENCES} objects with image_url."
        )
    if body.get("image") is not None:
        raise InvalidRequest("images", "images are given, and image is too; send one of them.")
    changed["image"] = [_referenced(one, f"images.{place}") for place, one in enumerate(images)]
    return changed


def _referenced(reference: Any, field: str) -> str:
    """Return the data URL of a reference to an image."""
    if not isinstance(reference, dict):
        raise InvalidRequest(field, f"{field} must be an object with image_url.")
    given: dict[str, Any] = {name: one for name, one in reference.items() if one is not None}
    if "file_id" in given:
        raise InvalidRequest(
            f"{field}.file_id",
            f"{field}.file_id is given, but no files are stored here; send image_url with a data "
            "URL.",
        )
    for name in given.keys() - {"image_url"}:
        raise InvalidRequest(
            f"{field}.{name[:60]}", f"{field} has {name[:60]!r}; only image_url is allowed."
        )
    url = given.get("image_url")
    if not isinstance(url, str):
        raise InvalidRequest(field, f"{field} must be an object with image_url.")
    if url[:5].lower() != "data:":
        raise InvalidRequest(
            f"{field}.image_url",
            f"{field}.image_url is {url[:60]!r}, which is not fetched; send a data URL, such as "
            "'data:image/png;base64,...'.",
        )
    return url


def request_of(
    body: ImageGeneration, hosts: Callable[[str], bool]
) -> tuple[GenerateRequest, tuple[str, ...]]:
    """Return the request in Weft's own format, and sentences about what has no effect.

    Args:
        body: request as sent.
        hosts: function that tells whether a model has a name, as the operator may have chosen one
            of OpenAI's.
    """
    own = GenerateRequest.model_fields.keys() & body.model_fields_set
    given: dict[str, Any] = {name: getattr(body, name) for name in own}
    # Previews are made only for streams that show them.
    given["stream"] = body.stream and body.partial_images > 0
    notes = _ignored(body)
    named = body.model
    if named is not None and _THEIR_MODELS.fullmatch(named) and not hosts(named):
        del given["model"]
        if _answers_by_url(body, named):
            given["response_format"] = "url"
        notes = (*notes, f"model {named!r} is OpenAI's; the default model is used instead.")
    # Every value was validated when the body was read.
    reading = replace(body.reading, edits=isinstance(body, ImageEdit))
    return GenerateRequest.model_construct(**given).read_as(reading), notes


def _answers_by_url(body: ImageGeneration, model: str) -> bool:
    """Return whether clients of one of OpenAI's models expect URLs; they read nothing else."""
    asked = "response_format" in body.model_fields_set
    return not asked and not body.stream and bool(_ANSWERED_BY_URL.fullmatch(model))


def _ignored(body: BaseModel) -> tuple[str, ...]:
    """Return one sentence that names the fields without effect, if there are any."""
    named = [
        field
        for field in _WITHOUT_EFFECT
        if field in body.model_fields_set and getattr(body, field) not in _NEUTRAL.get(field, ())
    ]
    named += [name[:60] for name in body.model_extra or ()]
    if not named:
        return ()
    return (f"Ignored, because there is no equivalent here: {', '.join(sorted(named))}.",)
