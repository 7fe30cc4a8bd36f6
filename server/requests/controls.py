"""The field `controls` of a request: ControlNets with their pictures, scales and windows."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.decoding.sizing import ResizeMode
from server.errors import ControlMismatch, InvalidRequest
from server.models.controls.control import Control, ControlUse, Precedence
from server.requests.numbers import Share
from server.requests.upload import Upload
from server.requests.windows import check_window

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel

__all__ = [
    "MAX_CONTROLS",
    "PRECEDENCE_LABELS",
    "RESIZE_LABELS",
    "STRONGEST",
    "ControlChoice",
    "ControlSettings",
    "check_controls",
    "load_controls",
    "settings_of_controls",
    "unloaded_controls",
]

MAX_CONTROLS: Final = 4
STRONGEST: Final = 4.0

RESIZE_LABELS: Final[Mapping[ResizeMode, str]] = {
    "stretch": "Just Resize",
    "crop": "Crop and Resize",
    "fill": "Resize and Fill",
}
"""Names of the modes in AUTOMATIC1111's ControlNet extension, in order of its numbers from 0."""

PRECEDENCE_LABELS: Final[Mapping[Precedence | None, str]] = {
    None: "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
}
"""Names of the extension's control modes, in order of its numbers from 0."""


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
        description="How to fit its picture if that has other proportions. Default: the request's "
        "`resize_mode`.",
    )
    preprocessor: Literal["invert"] | None = Field(
        default=None,
        description="Preprocessing of its picture: `invert` swaps black and white, for drawings in "
        "black on white. Default: none.",
    )
    precedence: Precedence | None = Field(
        default=None,
        description="What takes precedence where prompt and picture conflict, for models with a "
        "U-Net: with `prompt` the ControlNet adds less, the nearer to the network's input; with "
        "`control` it does so too, but only to the prompt's prediction, so that guidance amplifies "
        "it (diffusers' `guess_mode`). Default: neither.",
    )

    _check_window = model_validator(mode="after")(check_window)


class ControlChoice(ControlSettings):
    """One ControlNet of a request."""

    image: Upload = Field(
        repr=False,
        description="Its input picture, such as edges, a depth map or a pose, prepared as for its "
        "training: PNG, JPEG or WebP, as base64 or a base64 data URI. It is resized to `width` x "
        "`height` by `resize_mode`.",
    )

    @property
    def settings(self) -> ControlSettings:
        """The settings without the picture."""
        return ControlSettings.model_construct(**self.model_dump(exclude={"image"}))


def settings_of_controls(
    chosen: Sequence[ControlChoice], model: HostedModel, *, habitual: bool
) -> tuple[ControlSettings, ...]:
    """Return the ControlNets of a request without their pictures.

    Args:
        chosen: ControlNets of the request.
        model: model that will serve it.
        habitual: whether the client sends a precedence regardless of the model, so that it is
            dropped if the model's ControlNets do not support it.
    """
    settings = tuple(one.settings for one in chosen)
    if _knows_precedence(model) or not habitual:
        return settings
    return tuple(one.model_copy(update={"precedence": None}) for one in settings)


def check_controls(chosen: Sequence[ControlSettings], model: HostedModel) -> None:
    """Refuse ControlNets that the model does not have, or that are too large together.

    Raises:
        InvalidRequest: a ControlNet does not belong to the model, they can never be in memory at
            once, or one has a precedence, which the model's ControlNets do not support.
    """
    for place, one in enumerate(chosen):
        with _naming(place):
            model.controls.find(one.name)
        if one.precedence is not None and not _knows_precedence(model):
            field = f"controls.{place}.precedence"
            raise InvalidRequest(
                field,
                f"{field} is {one.precedence!r}, but only models with a U-Net support it, and "
                f"model {model.facts.name!r} has none; leave it out.",
            )
    acting = {one.name for one in chosen if one.scale}
    if len(acting) > 1:
        try:
            model.controls.check_together(map(model.controls.find, acting))
        except ControlMismatch as refusal:
            raise InvalidRequest("controls", f"controls: {refusal.message}") from None


def load_controls(
    chosen: Sequence[ControlSettings], pictures: Sequence[Tensor], model: HostedModel
) -> tuple[ControlUse, ...]:
    """Load the ControlNets of a checked request, except those of scale 0.

    Args:
        chosen: ControlNets of the request.
        pictures: picture of each ControlNet, ``[3, H, W]`` float32 in [-1, 1].
        model: model that will serve it.

    Raises:
        InvalidRequest: a folder was changed or removed after the check, or its weights do not match
            its config.
        Overloaded: the ControlNets of running requests, or the device, leave no room.
    """
    loaded: list[ControlUse] = []
    for place, (one, picture) in enumerate(zip(chosen, pictures, strict=True)):
        if one.scale == 0:
            continue
        with _naming(place):
            control = model.controls.load(one.name)
        loaded.append(_use_of(one, control, picture))
    return tuple(loaded)


def unloaded_controls(
    chosen: Sequence[ControlSettings], picture: Tensor, model: HostedModel
) -> tuple[ControlUse, ...]:
    """Return the ControlNets of a checked request with their cost, without loading them.

    Args:
        chosen: ControlNets of the request.
        picture: picture of the size that each of them will read; its content does not matter.
        model: model that will serve it.

    Raises:
        InvalidRequest: a folder was changed or removed after the check.
    """
    uses: list[ControlUse] = []
    for place, one in enumerate(chosen):
        if one.scale == 0:
            continue
        with _naming(place):
            control = Control(one.name, None, 0, model.controls.find(one.name).cost())
        uses.append(_use_of(one, control, picture.clone()))
    return tuple(uses)


def _use_of(chosen: ControlSettings, control: Control, picture: Tensor) -> ControlUse:
    how = chosen.scale, chosen.start, chosen.end, chosen.precedence
    return ControlUse(control, picture, *how)


def _knows_precedence(model: HostedModel) -> bool:
    return model.control_kind is not None and model.control_kind.knows_precedence


@contextmanager
def _naming(place: int) -> Generator[None]:
    """Add the request's field to refusals of a ControlNet within the `with` block."""
    try:
        yield
    except ControlMismatch as refusal:
        field = f"controls.{place}.name"
        raise InvalidRequest(field, f"{field}: {refusal.message}") from None
