"""The field `image_prompts` of a request: pictures that complement its prompt, by IP-Adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.errors import ImagePromptMismatch, InvalidRequest
from server.models.image_prompts.image_prompt import UNLOADED, ImagePromptUse
from server.models.image_prompts.region import region_bytes
from server.requests.numbers import Share
from server.requests.upload import Upload
from server.requests.windows import check_window

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel
    from server.models.image_prompts.ip_adapter_file import IPAdapterFile

__all__ = [
    "MAX_IMAGE_PROMPTS",
    "ImagePromptChoice",
    "ImagePromptSettings",
    "check_image_prompts",
    "load_image_prompts",
    "sides_of_image_prompts",
    "unloaded_image_prompts",
]

MAX_IMAGE_PROMPTS: Final = 4
MAX_PICTURES: Final = 4
STRONGEST: Final = 4.0


def _several(value: Any) -> Any:
    """Wrap a single picture in a tuple."""
    return value if isinstance(value, list | tuple) else (value,)


Pictures = Annotated[
    tuple[Upload, ...],
    BeforeValidator(_several, json_schema_input_type=Upload | tuple[Upload, ...]),
]


class ImagePromptSettings(BaseModel):
    """One image prompt of a request, without its pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        min_length=1,
        max_length=128,
        description="Name of an IP-Adapter, as the catalog lists it for the model.",
    )
    scale: float = Field(
        default=1.0,
        ge=0,
        le=STRONGEST,
        strict=True,
        description="Factor on the attention to the picture (diffusers' `set_ip_adapter_scale`); "
        "0 switches it off.",
    )
    start: Share = Field(
        default=0.0,
        description="Share of the run after which it begins to act.",
    )
    end: Share = Field(
        default=1.0,
        description="Share of the run after which it no longer acts.",
    )

    _check_window = model_validator(mode="after")(check_window)


class ImagePromptChoice(ImagePromptSettings):
    """One image prompt of a request."""

    image: Pictures = Field(
        min_length=1,
        max_length=MAX_PICTURES,
        repr=False,
        description="What the images should resemble, in content or style: PNG, JPEG or WebP, as "
        "base64 or a base64 data URI, or a list of up to four, which are attended to together. The "
        "image encoder reads the square in its middle.",
    )
    mask: Upload | None = Field(
        default=None,
        repr=False,
        description="Where in the images it acts (white) and where not (black), resized to `width` "
        "x `height` by `resize_mode` (diffusers' `ip_adapter_masks`). Default: everywhere.",
    )

    @property
    def settings(self) -> ImagePromptSettings:
        """The settings without the pictures."""
        return ImagePromptSettings.model_construct(**self.model_dump(exclude={"image", "mask"}))


def check_image_prompts(chosen: Sequence[ImagePromptSettings], model: HostedModel) -> None:
    """Refuse IP-Adapters that the model does not have, or that are too large together.

    Raises:
        InvalidRequest: an IP-Adapter does not belong to the model, or they can never be in memory
            at once.
    """
    found = [_found(place, one, model) for place, one in enumerate(chosen)]
    try:
        acting = [file for file, one in zip(found, chosen, strict=True) if one.scale]
        model.image_prompts.check_together(acting)
    except ImagePromptMismatch as refusal:
        raise InvalidRequest("image_prompts", f"image_prompts: {refusal.message}") from None


def sides_of_image_prompts(chosen: Sequence[ImagePromptSettings], model: HostedModel) -> list[int]:
    """Return the side in pixels of the square picture that each image encoder reads.

    Raises:
        InvalidRequest: a file was changed or removed after the check.
    """
    return [_found(place, one, model).encoder.side for place, one in enumerate(chosen)]


def load_image_prompts(
    chosen: Sequence[ImagePromptSettings],
    pictures: Sequence[Sequence[Tensor]],
    regions: Sequence[Tensor | None],
    model: HostedModel,
) -> tuple[ImagePromptUse, ...]:
    """Load the image prompts of a checked request, except those of scale 0.

    Args:
        chosen: image prompts of the request.
        pictures: pictures of each image prompt, each ``[3, side, side]`` float32 in [-1, 1].
        regions: region in which each image prompt acts, ``[H, W]`` float32 of the size of the
            images; None for the whole image.
        model: model that will serve it.

    Raises:
        InvalidRequest: a file was changed or removed after the check, or the weights do not match
            their headers.
        Overloaded: the IP-Adapters of running requests, or the device, leave no room.
    """
    loaded: list[ImagePromptUse] = []
    for place, (one, shown, region) in enumerate(zip(chosen, pictures, regions, strict=True)):
        if one.scale == 0:
            continue
        kv_bytes = _kv_bytes(_found(place, one, model), len(shown), region, model)
        try:
            adapter = model.image_prompts.load(one.name)
        except ImagePromptMismatch as refusal:
            raise _refused(place, refusal) from None
        how = one.scale, one.start, one.end, region
        loaded.append(ImagePromptUse(adapter, tuple(shown), kv_bytes, *how))
    return tuple(loaded)


def unloaded_image_prompts(
    chosen: Sequence[ImagePromptChoice], width: int, height: int, model: HostedModel
) -> tuple[ImagePromptUse, ...]:
    """Return placeholders for the image prompts of a request, with their memory but not loaded.

    Args:
        chosen: image prompts of the request.
        width: width of the images.
        height: height of the images.
        model: model that will serve it.

    Raises:
        InvalidRequest: a file was changed or removed after the check.
    """
    import torch

    uses: list[ImagePromptUse] = []
    for place, one in enumerate(chosen):
        file = _found(place, one, model)
        if one.scale == 0:
            continue
        side, count = file.encoder.side, len(one.image)
        picture = torch.empty(3, side, side, device="meta")
        region = None if one.mask is None else torch.empty(height, width, device="meta")
        kv_bytes = _kv_bytes(file, count, region, model)
        uses.append(ImagePromptUse(UNLOADED, (picture,) * count, kv_bytes, region=region))
    return tuple(uses)


def _found(place: int, one: ImagePromptSettings, model: HostedModel) -> IPAdapterFile:
    try:
        return model.image_prompts.find(one.name)
    except ImagePromptMismatch as refusal:
        raise _refused(place, refusal) from None


def _refused(place: int, refusal: ImagePromptMismatch) -> InvalidRequest:
    field = f"image_prompts.{place}.name"
    return InvalidRequest(field, f"{field}: {refusal.message}")


def _kv_bytes(file: IPAdapterFile, pictures: int, region: Tensor | None, model: HostedModel) -> int:
    attention = model.image_attention
    if attention is None:
        return 0
    shown = attention.kv_bytes(pictures * file.tokens, model.dtype)
    if region is None:
        return shown
    height, width = region.shape
    latents = model.latent_shape(width, height)
    return shown + region_bytes(*latents[1:], model.dtype)
