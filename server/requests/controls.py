"""The field `controls` of a request: ControlNets, the pictures they read, how strongly and when."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.decoding.sizing import ResizeMode
from server.errors import ControlMismatch, InvalidRequest
from server.models.controls.control import Control, ControlUse
from server.requests.numbers import Share
from server.requests.upload import Upload
from server.requests.windows import check_window

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel

__all__ = [
    "MOST",
    "RESIZE_LABELS",
    "STRONGEST",
    "ControlChoice",
    "ControlSettings",
    "check_controls",
    "load_controls",
    "unloaded_controls",
]

MOST: Final = 4
STRONGEST: Final = 4.0

RESIZE_LABELS: Final[Mapping[ResizeMode, str]] = {
    "stretch": "Just Resize",
    "crop": "Crop and Resize",
    "fill": "Resize and Fill",
}
"""What AUTOMATIC1111's extension for ControlNets calls the modes, from its 0."""


class ControlSettings(BaseModel):
    """One ControlNet of a request, without its picture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        min_length=1,
        max_length=128,
        description="Name of a ControlNet, as the catalog lists it for the model.",
    )
    scale: float = Field(
        default=1.0,
        ge=0,
        le=STRONGEST,
        strict=True,
        description="Factor on what the ControlNet adds (diffusers' "
        "`controlnet_conditioning_scale`); 0 switches it off.",
    )
    start: Share = Field(
        default=0.0,
        description="Share of the run after which it begins to act (diffusers' "
        "`control_guidance_start`).",
    )
    end: Share = Field(
        default=1.0,
        description="Share of the run after which it no longer acts (diffusers' "
        "`control_guidance_end`).",
    )
    resize_mode: ResizeMode | None = Field(
        default=None,
        description="What becomes of its picture if that has other proportions. Default: the "
        "request's `resize_mode`.",
    )
    preprocessor: Literal["invert"] | None = Field(
        default=None,
        description="What is done to its picture first: `invert` exchanges black and white, for "
        "drawings in black on white. Default: nothing.",
    )

    _check_window = model_validator(mode="after")(check_window)


class ControlChoice(ControlSettings):
    """One ControlNet of a request."""

    image: Upload = Field(
        repr=False,
        description="What it reads, such as edges, a depth map or a pose, prepared as it was "
        "trained with: PNG, JPEG or WebP, as base64 or a base64 data URI. It is brought to `width` "
        "x `height` by `resize_mode`.",
    )

    @property
    def settings(self) -> ControlSettings:
        """The same without the picture."""
        return ControlSettings.model_construct(**self.model_dump(exclude={"image"}))


def check_controls(chosen: Sequence[ControlSettings], model: HostedModel) -> None:
    """Refuse ControlNets that the model does not have, or that are too large together.

    Raises:
        InvalidRequest: one is none of the model's, or they can never be in memory at once.
    """
    for place, one in enumerate(chosen):
        with _naming(place):
            model.controls.find(one.name)
    acting = {one.name for one in chosen if one.scale}
    if len(acting) > 1:
        try:
            model.controls.check_together(map(model.controls.find, acting))
        except ControlMismatch as refusal:
            raise InvalidRequest("controls", f"controls: {refusal.message}") from None


def load_controls(
    chosen: Sequence[ControlSettings], pictures: Sequence[Tensor], model: HostedModel
) -> tuple[ControlUse, ...]:
    """The ControlNets of a checked request, loaded; those of scale 0 are left out.

    Args:
        chosen: of the request.
        pictures: what each of them reads, ``[3, H, W]`` float32 in [-1, 1].
        model: that will serve it.

    Raises:
        InvalidRequest: a folder was changed or removed after the check, or its weights are not
            those that its config describes.
        Overloaded: the ControlNets of requests under way, or the device, leave no room.
    """
    loaded: list[ControlUse] = []
    for place, (one, picture) in enumerate(zip(chosen, pictures, strict=True)):
        if one.scale == 0:
            continue
        with _naming(place):
            control = model.controls.load(one.name)
        loaded.append(ControlUse(control, picture, one.scale, one.start, one.end))
    return tuple(loaded)


def unloaded_controls(
    chosen: Sequence[ControlSettings], picture: Tensor, model: HostedModel
) -> tuple[ControlUse, ...]:
    """The ControlNets of a checked request before any is loaded, by what they will cost.

    Args:
        chosen: of the request.
        picture: of the size that each of them will read one of; its content does not matter.
        model: that will serve it.

    Raises:
        InvalidRequest: a folder was changed or removed after the check.
    """
    uses: list[ControlUse] = []
    for place, one in enumerate(chosen):
        if one.scale == 0:
            continue
        with _naming(place):
            control = Control(one.name, None, 0, model.controls.find(one.name).cost())
        uses.append(ControlUse(control, picture.clone(), one.scale, one.start, one.end))
    return tuple(uses)


@contextmanager
def _naming(place: int) -> Generator[None]:
    """Let refusals within the `with` block say which ControlNet of a request they are about."""
    try:
        yield
    except ControlMismatch as refusal:
        field = f"controls.{place}.name"
        raise InvalidRequest(field, f"{field}: {refusal.message}") from None
