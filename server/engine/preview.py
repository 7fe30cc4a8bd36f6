"""Small pictures of images under way, straight from the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from server.models.hosted import HostedModel

SAMPLES = 8
PATCHES = 4
ENLARGED = 4
"""Preview pixels along one side of a latent cell."""


def fit_preview(model: HostedModel) -> Tensor:
    """The affine map from a latent cell to its mean colour, ``[C + 1, 3]``.

    Fitted by least squares on pictures of random patches of colour that the model's own
    autoencoder encodes, so it suits any autoencoder without a table of factors.
    """
    generator = torch.Generator().manual_seed(0)
    side = max(model.facts.size_multiple, 8 * model.facts.latent_scale)
    patches = torch.rand(SAMPLES, 3, PATCHES, PATCHES, generator=generator) * 2 - 1
    pixels = F.interpolate(patches, size=(side, side), mode="nearest").to(model.device)
    latents = model.encode(pixels).movedim(1, -1).flatten(0, 2)
    colours = F.avg_pool2d(pixels, model.facts.latent_scale).movedim(1, -1).flatten(0, 2)
    ones = torch.ones(len(latents), 1, device=latents.device)
    return torch.linalg.lstsq(torch.cat([latents, ones], 1), colours).solution


def preview(denoised: Tensor, colours: Tensor) -> NDArray[np.uint8]:
    """uint8 ``[4 h, 4 w, 3]`` of a denoised prediction ``[C, h, w]``."""
    flat = denoised.movedim(0, -1) @ colours[:-1] + colours[-1]
    picture = F.interpolate(flat.movedim(-1, 0)[None], scale_factor=ENLARGED, mode="bilinear")[0]
    return to_uint8(picture[None])[0]


def to_uint8(pictures: Tensor) -> NDArray[np.uint8]:
    """uint8 ``[rows, H, W, 3]`` on the CPU of pictures ``[rows, 3, H, W]`` in [-1, 1]."""
    scaled = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
