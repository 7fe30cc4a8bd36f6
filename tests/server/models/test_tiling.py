"""Large pictures pass autoencoders in tiles, others whole, with the same bits as in diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from server.models import tiling
from server.models.autoencoder import Autoencoder
from tests.server.models.tiny_sdxl import VAE

SIDE = 160


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(**VAE).eval().requires_grad_(requires_grad=False)


@pytest.fixture
def sides(network: Any) -> Any:
    """Sides, in pixels, of what the decoder was given at once."""
    seen: list[int] = []

    def watch(_: Any, given: tuple[Tensor, ...]) -> None:
        seen.append(2 * given[0].shape[-1])

    hook = network.decoder.register_forward_pre_hook(watch)
    yield seen
    hook.remove()


def test_a_picture_over_the_bound_is_decoded_and_encoded_in_tiles(
    network: Any, sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = Autoencoder(network, torch.device("cpu"))
    latents = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(1))
    whole = autoencoder.decode(latents)
    scaled = latents / network.config.scaling_factor
    assert torch.equal(whole, network.decode(scaled).sample)
    assert sides == [SIDE, SIDE]
    sides.clear()
    monkeypatch.setattr(tiling, "MAX_UNTILED_PIXELS", SIDE**2 - 1)
    tiled = autoencoder.decode(latents)
    assert max(sides) == network.tile_sample_min_size == 64
    assert torch.equal(tiled, network.tiled_decode(scaled).sample)
    assert tiled.shape == whole.shape
    encoded = autoencoder.encode(whole)
    theirs = network.encode(whole).latent_dist.mode() * network.config.scaling_factor
    assert encoded.shape == latents.shape
    assert torch.equal(encoded, theirs)
    # The next picture, if it is not so large, is decoded whole again.
    assert torch.equal(
        autoencoder.decode(latents[..., :40]), network.decode(scaled[..., :40]).sample
    )
    assert not network.use_tiling
