"""Copies of models with thin networks of random weights, whose forwards take little time.

Its pictures show nothing, but tell seeds, prompts, samplers, guidance and edits apart more sharply
than those of the trained one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedded import MODEL_FOLDER
from server.models.folder import DERIVED, adapters_folder, revisions_of
from server.models.unet_model import WEAK_FOLDER
from tests.server.models.adapters.files import peft
from tests.server.models.adapters.low_rank import changes

UNET: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""As many levels as the trained networks, so that sides are multiples of the same number."""

VAE: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (0, 1, 1, 1),
    "num_decoder_blocks": (1, 1, 1, 1),
}


def save_thin_model(folder: Path, trained: Path = MODEL_FOLDER) -> None:
    """Write the folder of a thin model; what is not given here is as in the trained model.

    Files derived from the weights of the trained model are marked as derived from these.
    """
    left_out = shutil.ignore_patterns("unet", "vae", "weak", "adapters")
    shutil.copytree(trained, folder, ignore=left_out)
    torch.manual_seed(0)
    unet = _unet(trained)
    unet.save_pretrained(folder / "unet")
    if (trained / WEAK_FOLDER).exists():
        _unet(trained).save_pretrained(folder / WEAK_FOLDER)
    vae = _made(AutoencoderTiny, trained / "vae", VAE)
    # Pictures of all brightnesses, and latents as large as noise.
    _spread(vae.decoder, torch.randn(4, 4, 16, 16), 0.5)
    _spread(vae.encoder, torch.rand(4, 3, 64, 64) * 2 - 1, 0.7)
    vae.save_pretrained(folder / "vae")
    before, after = (revisions_of(one).denoiser for one in (trained, folder))
    for file in (folder / DERIVED).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            told = {name: text.replace(before, after) for name, text in opened.metadata().items()}
        save_file(load_file(file), file, told)
    for file in adapters_folder(trained).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        tensors, _ = peft({"unet": changes(unet, 4)})
        adapters_folder(folder).mkdir(exist_ok=True)
        save_file(tensors, adapters_folder(folder) / file.name, told)


def _unet(trained: Path) -> Any:
    unet = _made(UNet2DConditionModel, trained / "unet", UNET)
    with torch.no_grad():
        # Predictions as large as a trained network's, with a clear effect of the text.
        for name, weight in unet.named_parameters():
            weight *= 3 if name.startswith("conv_out") else 2 if "attn2" in name else 1
    return unet


@torch.no_grad()
def _spread(network: Any, inputs: Tensor, deviation: float) -> None:
    """Give the output of each channel mean 0 and this standard deviation."""
    channels, last = (0, 2, 3), network.layers[-1]
    last.weight *= (deviation / network(inputs).std(channels)).view(-1, 1, 1, 1)
    # A decoder doubles what a bias adds.
    last.bias[:] = 0
    without = network(inputs).mean(channels)
    last.bias += 1
    last.bias[:] = -without / (network(inputs).mean(channels) - without)


def _made(kind: Any, part: Path, changed: dict[str, Any]) -> Any:
    return kind.from_config({**kind.load_config(part), **changed})
