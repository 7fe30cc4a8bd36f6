"""Small previews of images under way, computed directly from their latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel

SAMPLES = 16
PATCHES = 2
CELLS = 16
"""Number of pictures to fit on, and of color patches and latent cells along their sides."""

MAX_MULTIPLIED = 32
"""Largest number of latent channels for which products of channels are features."""

RIDGE = 1e-8
"""Ridge penalty of the fit, relative to the mean square of its features."""

ENLARGED = 4
"""Preview pixels along one side of a latent cell."""

EDGE = 2
"""Cells along each side that take their inner neighbors' colors. An autoencoder pads pictures
with zeros, so its latents at the edge do not stand for the same colors as elsewhere."""


def fit_preview(model: HostedModel) -> Tensor:
    """Fit the map from the features of a latent cell to its mean color, ``[features, 3]``.

    It is fitted by least squares on pictures of random color patches, encoded by the model's own
    autoencoder, so it works for any autoencoder without a table of factors.
    """
    generator = torch.Generator().manual_seed(0)
    side = max(model.facts.size_multiple, CELLS * model.facts.latent_scale)
    patches = torch.rand(SAMPLES, 3, PATCHES, PATCHES, generator=generator) * 2 - 1
    pixels = F.interpolate(patches, size=(side, side), mode="nearest").to(model.device)
    latents = _inner(model.encode_image(pixels)).movedim(1, -1)
    colors = _inner(F.avg_pool2d(pixels, model.facts.latent_scale)).movedim(1, -1)
    return _ridge(_features(latents).flatten(0, 2).double(), colors.flatten(0, 2).double()).float()


def previews(denoised: Tensor, colors: Tensor) -> Tensor:
    """Previews of denoised predictions ``[images, C, h, w]``, uint8 ``[images, 4 h, 4 w, 3]``."""
    flat = _features(_beyond_edge(denoised).movedim(1, -1)) @ colors
    pictures = F.interpolate(flat.movedim(-1, 1), scale_factor=ENLARGED, mode="bilinear")
    return to_uint8(pictures)


def _inner(cells: Tensor) -> Tensor:
    """Cells ``[n, C, h, w]`` without those at the edge."""
    return cells[..., EDGE:-EDGE, EDGE:-EDGE]


def _beyond_edge(cells: Tensor) -> Tensor:
    """Cells ``[n, C, h, w]`` with those at the edge replaced by their inner neighbors."""
    rows, columns = (_clear_of_edge(side).to(cells.device) for side in cells.shape[-2:])
    return cells.index_select(-2, rows).index_select(-1, columns)


def _clear_of_edge(side: int) -> Tensor:
    """Indices along a side, each at least ``EDGE`` from its ends if the side is long enough."""
    return torch.arange(side).clamp(min(EDGE, side // 2), max(side - 1 - EDGE, side // 2))


def _ridge(features: Tensor, colors: Tensor) -> Tensor:
    """Ridge regression, which stays well-posed for many channels and for flat patches."""
    products = features.mT @ features
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    return torch.linalg.solve(products, features.mT @ colors)


def _features(cells: Tensor) -> Tensor:
    """Map ``[..., C]`` to ``[..., C + C (C + 1) / 2 + 1]``: the channels, their products, and 1.

    The products matter: on the embedded model, channels alone render white as a light green. With
    more than ``MAX_MULTIPLIED`` channels there would be more products than cells to fit them on.
    """
    if cells.shape[-1] > MAX_MULTIPLIED:
        return torch.cat([cells, torch.ones_like(cells[..., :1])], -1)
    first, second = torch.triu_indices(cells.shape[-1], cells.shape[-1], device=cells.device)
    products = cells[..., first] * cells[..., second]
    return torch.cat([cells, products, torch.ones_like(cells[..., :1])], -1)


def to_uint8(pictures: Tensor) -> Tensor:
    """Convert pictures ``[rows, 3, H, W]`` in [-1, 1] to uint8 ``[rows, H, W, 3]``."""
    scaled = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)
