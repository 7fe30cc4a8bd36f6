"""The embedded model with thin networks of random weights, whose forwards take little time.

Its pictures show nothing, but tell seeds, prompts, samplers, guidance and edits apart more sharply
than those of the trained one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from embedded import MODEL_FOLDER
from server.models.classifier import LatentClassifier
from server.models.folder import classifier_file, revisions_of
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.statistics import ModelStatistics
from server.models.unet_model import WEAK_FOLDER

UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
VAE: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (0, 1, 1, 1),
    "num_decoder_blocks": (1, 1, 1, 1),
}


def put_thin_model(folder: Path) -> None:
    """Write the folder of the thin model; what is not given here is as in the embedded model."""
    shutil.copytree(MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("weft", "unet", "vae"))
    torch.manual_seed(0)
    for name in ("unet", WEAK_FOLDER):
        _unet().save_pretrained(folder / name)
    vae = _made(AutoencoderTiny, "vae", VAE)
    with torch.no_grad():
        # Pictures of all brightnesses, and latents as large as noise.
        for part in (vae.decoder, vae.encoder):
            part.layers[-1].weight *= 8
    vae.save_pretrained(folder / "vae")


def _unet() -> Any:
    unet = _made(UNet2DConditionModel, "unet", UNET)
    with torch.no_grad():
        # Predictions as large as a trained network's, with a clear effect of the text.
        for name, weight in unet.named_parameters():
            weight *= 3 if name.startswith("conv_out") else 2 if "attn2" in name else 1
    return unet


def _made(kind: Any, part: str, changed: dict[str, Any]) -> Any:
    return kind.from_config({**kind.load_config(MODEL_FOLDER / part), **changed})


def thin_model(folder: Path) -> HostedModel:
    """Load the thin model from its folder, with what the embedded model has for its latents.

    That is its classifier and its statistics; DPM-Solver-v3 uses whatever statistics it is given.
    """
    model = load_model(folder, name="embedded", device="cpu", dtype="float32")
    model.classifier = LatentClassifier.load(classifier_file(MODEL_FOLDER))
    trained = revisions_of(MODEL_FOLDER).denoiser
    model.statistics = ModelStatistics.of(MODEL_FOLDER, trained, model.default_schedule)
    return model
