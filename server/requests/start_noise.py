"""Settings of the start noise of images besides the seed."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from server.requests.numbers import Count

__all__ = ["MAX_SEED", "NoiseSize", "VariationChoice"]

MAX_SEED: Final = 2**63 - 1


class VariationChoice(BaseModel):
    """Variations of the image of a seed: its start noise is rotated towards that of another seed.

    Like AUTOMATIC1111's variation seeds. All images of the request have the same `seed`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Count | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the other noise for the first image; image i has seed + i. Default: "
        "random, and reported in the response.",
    )
    strength: float = Field(
        gt=0,
        le=1,
        strict=True,
        description="How far the noise is rotated towards the other: 1 is the image of the other "
        "seed.",
    )


class NoiseSize(BaseModel):
    """The size of another picture, whose start noise is used in the middle of the images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Count = Field(ge=8, le=16384, description="Width of that picture in pixels.")
    height: Count = Field(ge=8, le=16384, description="Height of that picture in pixels.")
