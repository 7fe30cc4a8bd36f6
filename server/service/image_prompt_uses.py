"""Image prompts of a request, after their pictures are decoded."""

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

__all__ = ["image_prompt_uses", "rescale_regions"]


def image_prompt_uses(
    request: ResolvedRequest, uploads: Uploads, model: HostedModel
) -> tuple[ImagePromptUse, ...]:
    """Load the image prompts of a checked request; errors are those of `load_image_prompts`.

    Args:
        request: checked request.
        uploads: pictures of the request.
        model: model that will serve it.
    """
    pictures = [[*map(pixels_tensor, shown)] for shown in uploads.image_prompts]
    return load_image_prompts(request.image_prompts, pictures, _tensors(uploads.regions), model)


def rescale_regions(
    uses: Sequence[ImagePromptUse], request: ResolvedRequest, uploads: Uploads
) -> tuple[ImagePromptUse, ...]:
    """Adapt image prompts to the second run, whose regions have the size of its images.

    Args:
        uses: image prompts of the first run.
        request: request of either run.
        uploads: pictures of the request.
    """
    acting = [one.scale > 0 for one in request.image_prompts]
    regions = compress(_tensors(uploads.regions_again), acting)
    return tuple(
        use if region is None else replace(use, region=region)
        for use, region in zip(uses, regions, strict=True)
    )


def _tensors(regions: Sequence[NDArray[np.uint8] | None]) -> list[Tensor | None]:
    return [None if one is None else region_tensor(one) for one in regions]
