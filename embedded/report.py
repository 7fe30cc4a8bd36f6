"""Measure the embedded model on unseen captions, with images read by the checker."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from embedded.checker import compare, read_picture
from embedded.scenes import Scene, make_scene, render, to_pixels

ATTRIBUTES: Final = ("count", "shape", "colour", "size", "place", "relation", "background")

_FIRST_SEED: Final = 3_000_000_000


@dataclass(slots=True)
class Score:
    """Counts of pictures in which all attributes were right, and in which each of them was."""

    pictures: int = 0
    right: int = 0
    claimed: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: dict[str, bool]) -> None:
        """Count one picture, given the checker's verdict for each attribute."""
        self.pictures += 1
        self.right += all(verdict.values())
        self.claimed.update(verdict.keys())
        self.met.update(name for name, right in verdict.items() if right)

    def share(self, attribute: str | None = None) -> float:
        """Fraction of pictures right in all attributes, or in one; NaN if none claims it."""
        right, of = self.right, self.pictures
        if attribute is not None:
            right, of = self.met[attribute], self.claimed[attribute]
        return right / of if of else float("nan")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings: DDIM steps, guidance scale, and seed of the first picture's noise."""

    steps: int = 25
    scale: float = 4.0
    seed: int = 0
    batch: int = 40


def unseen_scenes(things: int, count: int, known: frozenset[str]) -> list[Scene]:
    """The first scenes from the report's own seeds whose captions are not known ones."""
    found: list[Scene] = []
    seed = _FIRST_SEED + things * 100_000_000
    while len(found) < count:
        scene = make_scene(seed, things=things)
        seed += 1
        if scene.caption not in known:
            found.append(scene)
    return found


def drawn(
    pipeline: StableDiffusionPipeline, captions: list[str], sampling: Sampling
) -> Iterator[np.ndarray]:
    """Draw each caption with a seed of its own: uint8 [128, 128, 3]."""
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(captions), sampling.batch):
        prompts = captions[start : start + sampling.batch]
        generators = [
            torch.Generator().manual_seed(sampling.seed + start + i) for i in range(len(prompts))
        ]
        (pictures, _) = pipeline(
            prompts,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.scale,
            generator=generators,
            output_type="np",
            return_dict=False,
        )
        yield from np.rint(np.asarray(pictures) * 255).astype(np.uint8)


def score_model(
    pipeline: StableDiffusionPipeline,
    scenes: list[Scene],
    sampling: Sampling,
) -> tuple[Score, np.ndarray]:
    """The score over the scenes' captions, and the pictures, uint8 [scenes, 128, 128, 3]."""
    score = Score()
    pictures = list(drawn(pipeline, [scene.caption for scene in scenes], sampling))
    for scene, picture in zip(scenes, pictures, strict=True):
        score.add(compare(scene.claim, read_picture(picture)))
    return score, np.stack(pictures)


@torch.no_grad()
def score_autoencoder(autoencoder: AutoencoderTiny, scenes: list[Scene], device: str) -> Score:
    """The score of reconstructions, as read by the checker and compared with the truth."""
    score = Score()
    for start in range(0, len(scenes), 50):
        chunk = scenes[start : start + 50]
        decoded = autoencoder.decoder(autoencoder.encoder(render(chunk, device)))
        for scene, picture in zip(chunk, to_pixels(decoded), strict=True):
            score.add(compare(scene.truth, read_picture(picture)))
    return score


def contact_sheet(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [rows * columns, H, W, 3] side by side: [rows * H, columns * W, 3]."""
    count, height, width, channels = pictures.shape
    grid = pictures.reshape(count // columns, columns, height, width, channels)
    return grid.swapaxes(1, 2).reshape(-1, columns * width, channels)


def table(scores: dict[str, Score]) -> str:
    """The scores as a Markdown table with one row each."""
    lines = [
        f"| captions | pictures | all right | {' | '.join(ATTRIBUTES)} |",
        "|---" * (3 + len(ATTRIBUTES)) + "|",
    ]
    for name, score in scores.items():
        shares = [
            f"{score.share(attribute):.1%}" if score.claimed[attribute] else ""
            for attribute in ATTRIBUTES
        ]
        lines.append(f"| {name} | {score.pictures} | {score.share():.1%} | {' | '.join(shares)} |")
    return "\n".join(lines)


def load_pipeline(folder: Path, device: str) -> StableDiffusionPipeline:
    """Diffusers' own pipeline on a model folder."""
    return StableDiffusionPipeline.from_pretrained(folder).to(device)
