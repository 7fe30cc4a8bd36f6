"""Large pictures pass an autoencoder in overlapping tiles, which bounds their memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGEST_WHOLE", "pixels_a_cell", "with_tiles"]

LARGEST_WHOLE: Final = 1536 * 1536
"""Pixels of the largest picture that passes whole."""


def with_tiles(network: Any, cells: Tensor, scale: int) -> Any:
    """An autoencoder of diffusers, which works in diffusers' own tiles if the picture is large.

    The tiles overlap by a quarter and are blended there: what depends on the whole picture, as the
    statistics of group norms do, depends on the tile instead.

    Args:
        network: that only one thread uses.
        cells: pictures or latents ``[..., h, w]``.
        scale: pixels along one side of a cell; 1 for pictures.
    """
    network.use_tiling = cells.shape[-1] * cells.shape[-2] * scale**2 > LARGEST_WHOLE
    return network


def pixels_a_cell(config: Any) -> int:
    """Pixels along one side of a cell of an autoencoder's latents, by its config."""
    # The lists of AutoencoderDC and of Qwen's autoencoder, and that of all others.
    if hasattr(config, "temperal_downsample"):
        return 2 ** len(config.temperal_downsample)
    if hasattr(config, "encoder_block_out_channels"):
        return 2 ** (len(config.encoder_block_out_channels) - 1)
    return 2 ** (len(config.block_out_channels) - 1)
