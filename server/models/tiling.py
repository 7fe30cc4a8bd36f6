"""Tiled encoding and decoding of large images, which bounds the memory of autoencoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_UNTILED_PIXELS", "pixels_a_cell", "with_tiles"]

MAX_UNTILED_PIXELS: Final = 1536 * 1536
"""Maximum number of pixels of an image that is processed as a whole."""

NEVER_TILED: Final = "AutoencoderTiny"
"""Class of autoencoders that process an image of any size as a whole."""


def with_tiles(network: Any, cells: Tensor, scale: int) -> Any:
    """Switch a diffusers autoencoder to diffusers' own tiling if the image is large.

    The tiles overlap by a quarter and are blended there. Quantities that depend on the whole image,
    such as the statistics of group norms, then depend on the tile instead. An ``AutoencoderTiny``
    is never tiled: it has few channels, and diffusers' tiles of it are for latents of four.

    Args:
        network: autoencoder that only one thread uses.
        cells: images or latents ``[..., h, w]``.
        scale: pixels along one side of a cell; 1 for images.
    """
    large = cells.shape[-1] * cells.shape[-2] * scale**2 > MAX_UNTILED_PIXELS
    network.use_tiling = large and type(network).__name__ != NEVER_TILED
    return network


def pixels_a_cell(config: Any) -> int:
    """Pixels along one side of a latent cell of an autoencoder, by its config."""
    # The config entry differs for Qwen's autoencoder, AutoencoderDC, and all others.
    if hasattr(config, "temperal_downsample"):
        return 2 ** len(config.temperal_downsample)
    if hasattr(config, "encoder_block_out_channels"):
        return 2 ** (len(config.encoder_block_out_channels) - 1)
    return 2 ** (len(config.block_out_channels) - 1)
