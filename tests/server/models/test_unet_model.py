"""What models of a U-Net and an autoencoder have in common, with any text encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from embedded import MODEL_FOLDER
from samplers import NoiseSchedule
from server.models.autoencoder import Autoencoder
from server.models.conditioning import StackedConditioning
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.unet_model import TEXT, UNetModel
from tests.server.models.tiny_sdxl import UNET, VAE

CPU = torch.device("cpu")


def tiny_autoencoder(**config: Any) -> Any:
    torch.manual_seed(1)
    return AutoencoderKL(**VAE | config).eval().requires_grad_(requires_grad=False)


@torch.inference_mode()
def test_channels_beside_the_latents_are_read_behind_them() -> None:
    torch.manual_seed(0)
    plain: dict[str, Any] = {**UNET, "addition_embed_type": None, "in_channels": 9}
    unet = UNet2DConditionModel(**plain).eval()
    hosted: Any = load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float32")
    model = UNetModel(
        hosted.facts,
        CPU,
        torch.float32,
        schedule=NoiseSchedule.from_diffusers({}),
        unet=unet,
        vae=tiny_autoencoder(),
        text=hosted._text,
    )
    x, beside, t = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16, 16), torch.tensor([500.0, 3.0])
    told = torch.randn(2, 7, 80)
    inputs = RowInputs(StackedConditioning({TEXT: told}), channels=beside)
    expected = unet(torch.cat([x, beside], 1), t, told).sample
    torch.testing.assert_close(model.evaluate(x, t, inputs), expected)
    [other] = model.evaluate(x[1:], t[1:], inputs.of([1]))
    torch.testing.assert_close(other, expected[1], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({}, lambda z: z / 0.13025),
        ({"shift_factor": 0.5}, lambda z: z / 0.13025 + 0.5),
        (
            {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 4.0, 6.0, 8.0]},
            # StableDiffusionXLPipeline prepares latents like this for such an autoencoder.
            lambda z: (
                z * torch.tensor([2.0, 4, 6, 8]).view(1, 4, 1, 1) / 0.13025
                + torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
            ),
        ),
    ],
    ids=["scale", "shift", "mean"],
)
def test_latents_are_scaled_as_the_autoencoder_was_trained(config: Any, scaled: Any) -> None:
    network = tiny_autoencoder(**config)
    autoencoder = Autoencoder(network, CPU)
    latents = torch.randn(1, 4, 8, 8)
    expected = network.decode(scaled(latents)).sample
    torch.testing.assert_close(autoencoder.decode(latents), expected)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mode = network.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(scaled(autoencoder.encode(pixels)), mode, rtol=1e-4, atol=1e-4)
