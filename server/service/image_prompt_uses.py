"""Image prompts of a request whose pictures are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from server.models.hosted import HostedModel
from server.models.image_prompts.image_prompt import ImagePromptUse
from server.requests.image_prompts import load_image_prompts
from server.requests.schema import ResolvedRequest
from server.service.pixels import pixels_tensor, region_tensor
from server.service.uploads import Uploads

__all__ = ["image_prompt_uses", "in_regions_again"]


def image_prompt_uses(
    request: ResolvedRequest, uploads: Uploads, model: HostedModel
) -> tuple[ImagePromptUse, ...]:
    """The image prompts of a checked request, loaded; errors are those of `load_image_prompts`.

    Args:
        request: that was checked.
        uploads: its pictures.
        model: that will serve it.
    """
    pictures = [[*map(pixels_tensor, shown)] for shown in uploads.image_prompts]
    return load_image_prompts(request.image_prompts, pictures, _tensors(uploads.regions), model)


def in_regions_again(
    uses: Sequence[ImagePromptUse], request: ResolvedRequest, uploads: Uploads
) -> tuple[ImagePromptUse, ...]:
    """The same in the second run, where regions have the size of its images.

    Args:
        uses: of the first run.
        request: of either.
        uploads: its pictures.
    """
    acting = [one.scale > 0 for one in request.image_prompts]
    regions = compress(_tensors(uploads.regions_again), acting)
    return tuple(
        use if region is None else replace(use, region=region)
        for use, region in zip(uses, regions, strict=True)
    )


def _tensors(regions: Sequence[NDArray[np.uint8] | None]) -> list[Tensor | None]:
    return [None if one is None else region_tensor(one) for one in regions]
