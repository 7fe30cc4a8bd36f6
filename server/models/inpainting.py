"""Input channels of inpainting U-Nets besides the latent: the mask, and the masked image.

They are prepared as in diffusers' ``StableDiffusionInpaintPipeline`` and
``StableDiffusionXLInpaintPipeline``, but with the mean of the autoencoder's posterior instead of a
sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from server.lru import ByteBoundedLRU

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.autoencoder import Autoencoder

MAX_CACHED_BYTES = 1 << 23
"""Maximum size of cached channels without an image, which suffices for a handful of sizes."""

HALF = 0.5
"""Mask values from this one up are repainted."""


class MaskChannels:
    """The channels that a U-Net reads after those of a latent: the mask, then a second latent.

    Args:
        autoencoder: encodes the masked image.
        scale: pixels along one side of a latent cell.
        device: device of the channels.
    """

    def __init__(self, autoencoder: Autoencoder, scale: int, device: torch.device) -> None:
        self._autoencoder = autoencoder
        self._scale = scale
        self._device = device
        self._without: ByteBoundedLRU[tuple[int, int], Tensor] = ByteBoundedLRU(
            MAX_CACHED_BYTES, lambda channels: channels.nbytes
        )

    def of(self, picture: Tensor, mask: Tensor) -> Tensor:
        """The channels ``[1 + C, h, w]`` for an image of which a part is repainted.

        Args:
            picture: ``[3, H, W]`` in [-1, 1].
            mask: ``[H, W]``, repainted from 0.5 up. The first pixel of a cell decides for the
                cell, as in these models' training; inpainting with other models differs in this.
        """
        repaint = (mask.to(self._device) >= HALF).float()
        picture = picture.to(self._device) * (1 - repaint)
        # One image per call: a larger batch would change the bits of the result.
        kept = self._autoencoder.encode(picture[None])[0]
        cells = F.interpolate(repaint[None, None], size=kept.shape[1:])[0]
        return torch.cat([cells, kept])

    def without_picture(self, height: int, width: int) -> Tensor:
        """The channels if everything is generated: a mask of ones, and a gray image.

        Args:
            height: height of the latent.
            width: width of the latent.
        """
        return self._without.get((height, width), lambda: self._everything(height, width))

    def _everything(self, height: int, width: int) -> Tensor:
        size = height * self._scale, width * self._scale
        return self.of(torch.zeros(3, *size), torch.ones(size))
