"""What inpainting U-Nets read behind the latents: where to repaint, and the picture around it.

As ``StableDiffusionInpaintPipeline`` and ``StableDiffusionXLInpaintPipeline`` of diffusers prepare
it, but with the mean of the autoencoder's posterior in place of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from server.lru import ByteBoundedLRU

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.autoencoder import Autoencoder

MOST_BYTES = 1 << 23
"""Of channels without a picture that are kept, which is those of a handful of sizes."""

HALF = 0.5
"""Pixels of a mask from here on are repainted."""


class MaskChannels:
    """The channels that a U-Net reads behind a latent: one of the mask, then a second latent.

    Args:
        autoencoder: that encodes the picture around what is repainted.
        scale: pixels along one side of a latent cell.
        device: of the channels.
    """

    def __init__(self, autoencoder: Autoencoder, scale: int, device: torch.device) -> None:
        self._autoencoder = autoencoder
        self._scale = scale
        self._device = device
        self._without: ByteBoundedLRU[tuple[int, int], Tensor] = ByteBoundedLRU(
            MOST_BYTES, lambda channels: channels.nbytes
        )

    def of(self, picture: Tensor, mask: Tensor) -> Tensor:
        """The channels ``[1 + C, h, w]`` of a picture of which a part is repainted.

        Args:
            picture: ``[3, H, W]`` in [-1, 1].
            mask: ``[H, W]``, from 0.5 on to repaint. Unlike where a model without such channels
                repaints, a cell counts by its first pixel, as these models were trained.
        """
        repaint = (mask.to(self._device) >= HALF).float()
        picture = picture.to(self._device) * (1 - repaint)
        # One picture a call: a larger batch would move its bits.
        kept = self._autoencoder.encode(picture[None])[0]
        cells = F.interpolate(repaint[None, None], size=kept.shape[1:])[0]
        return torch.cat([cells, kept])

    def without_picture(self, height: int, width: int) -> Tensor:
        """The channels where everything is drawn anew: a mask of ones, and a grey picture.

        Args:
            height: of the latent.
            width: of the latent.
        """
        return self._without.get((height, width), lambda: self._everything(height, width))

    def _everything(self, height: int, width: int) -> Tensor:
        size = height * self._scale, width * self._scale
        return self.of(torch.zeros(3, *size), torch.ones(size))
