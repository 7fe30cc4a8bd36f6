"""The field `image_prompts` of a request: pictures that stand beside its prompt, by IP-Adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.errors import ImagePromptMismatch, InvalidRequest
from server.models.image_prompts.image_prompt import UNLOADED, ImagePromptUse
from server.requests.upload import Upload
from server.requests.windows import check_window

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel
    from server.models.image_prompts.ip_adapter_file import IPAdapterFile

__all__ = [
    "MOST",
    "ImagePromptChoice",
    "ImagePromptSettings",
    "check_image_prompts",
    "load_image_prompts",
    "sides_of_image_prompts",
    "unloaded_image_prompts",
]

MOST: Final = 4
STRONGEST: Final = 4.0


class ImagePromptSettings(BaseModel):
    """One image prompt of a request, without its picture."""

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
    start: float = Field(
        default=0.0,
        ge=0,
        le=1,
        strict=True,
        description="Share of the run after which it begins to act.",
    )
    end: float = Field(
        default=1.0,
        ge=0,
        le=1,
        strict=True,
        description="Share of the run after which it no longer acts.",
    )

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        check_window(self.start, self.end)
        return self


class ImagePromptChoice(ImagePromptSettings):
    """One image prompt of a request."""

    image: Upload = Field(
        repr=False,
        description="What the images are to be like, in content or style: PNG, JPEG or WebP, as "
        "base64 or a base64 data URI. The square in its middle is shown to the image encoder.",
    )

    @property
    def settings(self) -> ImagePromptSettings:
        """The same without the picture."""
        return ImagePromptSettings.model_construct(**self.model_dump(exclude={"image"}))


def check_image_prompts(chosen: Sequence[ImagePromptSettings], model: HostedModel) -> None:
    """Refuse IP-Adapters that the model does not have, or that are too large together.

    Raises:
        InvalidRequest: one is none of the model's, or they can never be in memory at once.
    """
    found = [_found(place, one, model) for place, one in enumerate(chosen)]
    try:
        acting = [file for file, one in zip(found, chosen, strict=True) if one.scale]
        model.image_prompts.check_together(acting)
    except ImagePromptMismatch as refusal:
        raise InvalidRequest("image_prompts", f"image_prompts: {refusal.message}") from None


def sides_of_image_prompts(chosen: Sequence[ImagePromptSettings], model: HostedModel) -> list[int]:
    """Pixels along a side of the picture that each encoder reads.

    Raises:
        InvalidRequest: a file was changed or removed after the check.
    """
    return [_found(place, one, model).encoder.side for place, one in enumerate(chosen)]


def load_image_prompts(
    chosen: Sequence[ImagePromptSettings], pictures: Sequence[Tensor], model: HostedModel
) -> tuple[ImagePromptUse, ...]:
    """The image prompts of a checked request, loaded; those of scale 0 are left out.

    Args:
        chosen: of the request.
        pictures: of each of them, ``[3, side, side]`` float32 in [-1, 1].
        model: that will serve it.

    Raises:
        InvalidRequest: a file was changed or removed after the check, or the weights are not those
            that their headers describe.
        Overloaded: the IP-Adapters of requests under way, or the device, leave no room.
    """
    loaded: list[ImagePromptUse] = []
    for place, (one, picture) in enumerate(zip(chosen, pictures, strict=True)):
        if one.scale == 0:
            continue
        shown_bytes = _shown_bytes(_found(place, one, model), model)
        try:
            adapter = model.image_prompts.load(one.name)
        except ImagePromptMismatch as refusal:
            raise _refused(place, refusal) from None
        window = one.start, one.end
        loaded.append(ImagePromptUse(adapter, picture, shown_bytes, one.scale, *window))
    return tuple(loaded)


def unloaded_image_prompts(
    chosen: Sequence[ImagePromptSettings], model: HostedModel
) -> tuple[ImagePromptUse, ...]:
    """What stands for the image prompts of a request before any is loaded: their memory.

    Raises:
        InvalidRequest: a file was changed or removed after the check.
    """
    import torch

    found = [_found(place, one, model) for place, one in enumerate(chosen)]
    return tuple(
        ImagePromptUse(
            UNLOADED,
            torch.empty(3, file.encoder.side, file.encoder.side, device="meta"),
            _shown_bytes(file, model),
        )
        for file, one in zip(found, chosen, strict=True)
        if one.scale
    )


def _found(place: int, one: ImagePromptSettings, model: HostedModel) -> IPAdapterFile:
    try:
        return model.image_prompts.find(one.name)
    except ImagePromptMismatch as refusal:
        raise _refused(place, refusal) from None


def _refused(place: int, refusal: ImagePromptMismatch) -> InvalidRequest:
    field = f"image_prompts.{place}.name"
    return InvalidRequest(field, f"{field}: {refusal.message}")


def _shown_bytes(file: IPAdapterFile, model: HostedModel) -> int:
    attention = model.image_attention
    return 0 if attention is None else attention.shown_bytes(file.tokens, model.dtype)
