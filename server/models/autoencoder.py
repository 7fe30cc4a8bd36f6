"""A diffusers autoencoder, which converts between images and the denoiser's latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from server.models.tiling import pixels_a_cell, with_tiles

if TYPE_CHECKING:
    from torch import Tensor


class Autoencoder:
    """Decodes and encodes in the network's own dtype.

    Args:
        network: an ``AutoencoderKL``, ``AutoencoderTiny`` or ``AutoencoderDC`` in inference mode.
        device: device on which it runs.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self._device = device
        self.replace(network)

    def replace(self, network: Any) -> None:
        """Use another network and its config from now on.

        Args:
            network: autoencoder with the latents of the one before; see the class.
        """
        self.network = network.to(self._device, memory_format=torch.channels_last)
        config = network.config
        self._mean, self._deviation = (
            None if values is None else torch.tensor(values, device=self._device).view(1, -1, 1, 1)
            for values in (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        )
        self._scale: float = config.scaling_factor
        self._shift: float = getattr(config, "shift_factor", None) or 0.0

    @property
    def scaling(self) -> tuple[float, float]:
        """The scale and the shift between its network's latents and those of the denoiser."""
        return self._scale, self._shift

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents ``[rows, C, h, w]`` to images ``[rows, 3, H, W]`` in [-1, 1].

        The images are float32.
        """
        if self._mean is None or self._deviation is None:
            scaled = latents / self._scale + self._shift
        else:
            scaled = latents * self._deviation / self._scale + self._mean
        network = with_tiles(self.network, scaled, pixels_a_cell(self.network.config))
        return network.decode(scaled.to(network.dtype), return_dict=False)[0].float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images ``[rows, 3, H, W]`` in [-1, 1] to clean latents ``[rows, C, h, w]``.

        The latents are float32.
        """
        network = with_tiles(self.network, pixels, scale=1)
        encoded = network.encode(pixels.to(network.dtype))
        # The mean of the posterior, not a sample, so that the same image gives the same latent.
        latents = (
            encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.to_tuple()[0]
        )
        if self._mean is None or self._deviation is None:
            return (latents.float() - self._shift) * self._scale
        return (latents.float() - self._mean) * self._scale / self._deviation
