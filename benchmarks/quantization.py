"""Measure quantized weights: bytes, correct pictures, and difference from float32.

    python -m benchmarks.quantization [--pictures 96] [--kinds int8,fp8,nf4]

The embedded model draws captions that it was not trained on, each from the same noise with every
kind of weights, and the checker reads the pictures. The first table counts the weights of full-size
architectures, which are created without memory for their weights.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Final, cast, get_args

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

from benchmarks.likeness import psnr
from embedded import MODEL_FOLDER
from embedded.report import Sampling, score_model, unseen_scenes
from server.models.loading import load_model
from server.models.placement import Placement
from server.models.quantization import BITS, Quantization, missing_package
from server.models.quantized import layers_in_blocks
from server.models.weights_held import bytes_of

if TYPE_CHECKING:
    import numpy as np

    from embedded.scenes import Scene

SINGLE_FILE: Final = Path(str(files("server.models") / "single_file"))


def pipeline_of(kind: Quantization) -> tuple[StableDiffusionPipeline, int]:
    """Diffusers' own pipeline with networks quantized by Weft, and their size in bytes."""
    placement = Placement(kind)
    model = load_model(
        MODEL_FOLDER, name="embedded", device="cpu", dtype="float32", placement=placement
    )
    networks: dict[str, Any] = {
        part: network for part, network in model.modules().items() if "/" not in part
    }
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER, **networks)
    return pipeline, bytes_of(model)


def measured(kinds: list[Quantization], scenes: list[Scene], sampling: Sampling) -> str:
    """The table for the embedded model."""
    lines = [
        "| weights | MB | right | PSNR to float32 |",
        "|---|---|---|---|",
    ]
    whole: np.ndarray | None = None
    for kind in ("none", *kinds):
        pipeline, nbytes = pipeline_of(kind)
        score, pictures = score_model(pipeline, scenes, sampling)
        whole = pictures if whole is None else whole
        near = "" if kind == "none" else f"{mean(map(psnr, pictures, whole)):.1f} dB"
        right = f"{score.right} of {score.pictures}"
        name = "float32" if kind == "none" else kind
        lines.append(f"| {name} | {nbytes / 1e6:.1f} | {right} | {near} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def denoisers() -> dict[str, Any]:
    """Full-size denoisers by name, without memory for their weights."""

    def unet(family: str) -> Any:
        config = json.loads((SINGLE_FILE / family / "unet" / "config.json").read_text("utf-8"))
        return UNet2DConditionModel.from_config(config)

    with torch.device("meta"):
        return {
            "Stable Diffusion 1.5": unet("sd15"),
            "Stable Diffusion XL": unet("sdxl"),
            "Z-Image": ZImageTransformer2DModel(),
            "FLUX.1": FluxTransformer2DModel(guidance_embeds=True),
            "Qwen-Image": QwenImageTransformer2DModel(),
        }


def counted() -> str:
    """The table for full-size denoisers, with all other weights in half precision."""
    lines = [
        "| denoiser | weights | in quantised layers | half precision | int8, fp8 | nf4 |",
        "|---|---|---|---|---|---|",
    ]
    for name, network in denoisers().items():
        total = sum(one.numel() for one in network.parameters())
        layers = layers_in_blocks(network).values()
        inside = sum(one.in_features * one.out_features for one in layers)
        sizes = [
            f"{(2 * (total - inside) + inside * bits / 8) / 1e9:.2f} GB"
            for bits in (16.0, BITS["int8"], BITS["nf4"])
        ]
        share = f"{inside / total:.0%}"
        lines.append(f"| {name} | {total / 1e9:.2f} billion | {share} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Measure weights in fewer bits.")
    parser.add_argument("--pictures", type=int, default=96, help="of one and of two things")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--kinds", default="int8,fp8,nf4")
    options = parser.parse_args()
    asked = [kind for kind in options.kinds.split(",") if kind in get_args(Quantization)]
    kinds = [kind for kind in asked if missing_package(kind) is None]
    print(counted(), "\n", sep="")
    half = options.pictures // 2
    known = frozenset[str]()
    scenes = unseen_scenes(1, half, known) + unseen_scenes(2, options.pictures - half, known)
    measured(cast("list[Quantization]", kinds), scenes, Sampling(steps=options.steps))


if __name__ == "__main__":
    main()
