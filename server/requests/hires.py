"""The field `hires` of a request: a second run at a larger size, from the first run's result."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.requests.numbers import Count

__all__ = ["DEFAULT_SCALE", "UPSCALER_LABELS", "Hires", "Upscaler"]

DEFAULT_SCALE = 2.0

Upscaler: TypeAlias = Literal[
    "lanczos",
    "latent",
    "latent_antialiased",
    "latent_bicubic",
    "latent_bicubic_antialiased",
    "latent_nearest",
    "latent_nearest_exact",
]

UPSCALER_LABELS: Final[Mapping[Upscaler, str]] = MappingProxyType(
    {
        "lanczos": "Lanczos",
        "latent": "Latent",
        "latent_antialiased": "Latent (antialiased)",
        "latent_bicubic": "Latent (bicubic)",
        "latent_bicubic_antialiased": "Latent (bicubic antialiased)",
        "latent_nearest": "Latent (nearest)",
        "latent_nearest_exact": "Latent (nearest-exact)",
    }
)
"""AUTOMATIC1111's names for the upscalers."""


class Hires(BaseModel):
    """A second run that enlarges each image and draws details, as AUTOMATIC1111's "hires fix".

    Models compose images well at the size that they were trained at, and repeat motifs at larger
    sizes. So the first run composes the image at `width` x `height`, and the second run starts part
    way from the enlarged image and draws the details.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: float | None = Field(
        default=None,
        ge=1,
        le=8,
        strict=True,
        description="Factor for width and height; the result is rounded down to a size that the "
        f"model draws. Default: {DEFAULT_SCALE:g}, without `width` and `height`.",
    )
    width: Count | None = Field(
        default=None,
        ge=8,
        le=16384,
        description="Width of the second run in pixels; needs `height`.",
    )
    height: Count | None = Field(
        default=None,
        ge=8,
        le=16384,
        description="Height of the second run in pixels; needs `width`. If the proportions differ "
        "from those of the first run, the image is cropped around its middle.",
    )
    strength: float = Field(
        default=0.5,
        gt=0,
        le=1,
        strict=True,
        description="Share of the second run's steps that are run.",
    )
    steps: Count | None = Field(
        default=None, ge=1, description="Steps of the second run. Default: those of the first."
    )
    upscaler: Upscaler = Field(
        default="lanczos",
        description="How the image is enlarged: its pixels, by `lanczos`, or its latents, by "
        "`latent` (bilinear) and the others, which neither decode nor encode it. Enlarged latents "
        "are blurred and need a `strength` of about 0.5 or more.",
    )

    @property
    def of_latents(self) -> bool:
        """Whether latents are enlarged, so that the first run is not decoded."""
        return self.upscaler != "lanczos"

    @model_validator(mode="after")
    def _say_the_size_once(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise PydanticCustomError(
                "sentence", "hires has only one of width and height; send both, or scale instead."
            )
        if self.width is not None and self.scale is not None:
            raise PydanticCustomError(
                "sentence", "hires has both scale and width and height; send one or the other."
            )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the second run; 0 while unknown."""
        return self.width or 0, self.height or 0

    def filled_in(self, width: int, height: int, steps: int, multiple: int) -> Hires:
        """Return a copy with its size and steps filled in.

        Args:
            width: width of the first run.
            height: height of the first run.
            steps: steps of the first run.
            multiple: multiple of pixels that the model needs for width and height.
        """
        scale = DEFAULT_SCALE if self.scale is None else self.scale
        sides = (round(scale * side) for side in (width, height))
        larger = (max(multiple, side - side % multiple) for side in sides)
        wide, high = self.size if self.width else larger
        given = {"scale": None, "width": wide, "height": high, "steps": self.steps or steps}
        return self.model_copy(update=given)
