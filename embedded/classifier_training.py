"""Train the classifier of noisy latents that classifier guidance uses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from embedded.checkpoint import save
from embedded.components import make_scheduler
from embedded.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, make_scene, render
from server.models.classifier import LatentClassifier

HEADS: Final = {
    "count": ("one", "two"),
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "colour": tuple(COLORS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "minority": tuple(f"tenth {number}" for number in range(1, 11)),
}
"""Attributes and their classes. Attributes of a thing are learnt only from pictures of one thing;
minority is the tenth of the training pictures, ordered by how badly the model restores them."""

FIRST_SEED: Final = 5_000_000_000
"""First seed of pictures that were used neither for the model's training nor for its report."""

_LATENTS: Final = "latents"
_PAIRS_EVERY: Final = 5
"""One in this many pictures shows two things; from pairs, attributes of things are not learnt."""
_UNKNOWN: Final = -1
_BATCH: Final = 96
_PEAK_RATE: Final = 2e-3
_CLEAN: Final = 0.2
"""Fraction of the batch without noise, for predictions of the clean latent."""
_RESTORED_FROM: Final = 899
"""Timestep, nine tenths of the way to noise, that minority scores restore from (arXiv 2301.12334,
section 3.2)."""


@dataclass(frozen=True, slots=True)
class Labeled:
    """Clean latents ``[pictures, C, h, w]``; classes ``[pictures]`` by attribute, -1 unknown."""

    latents: Tensor
    classes: dict[str, Tensor]

    def parted(self, first: int) -> tuple["Labeled", "Labeled"]:
        """Split into the first pictures and the rest."""
        parts = (slice(first), slice(first, None))
        before, after = (
            Labeled(self.latents[part], {k: v[part] for k, v in self.classes.items()})
            for part in parts
        )
        return before, after

    def save(self, file: Path) -> None:
        """Write a safetensors file atomically."""
        save({_LATENTS: self.latents, **self.classes}, file)

    @classmethod
    def load(cls, file: Path) -> "Labeled":
        """Read what ``save`` wrote."""
        classes = load_file(file)
        return cls(classes.pop(_LATENTS), classes)


@torch.inference_mode()
def make_labeled(pipeline: StableDiffusionPipeline, pictures: int) -> Labeled:
    """Draw, encode and label pictures from new seeds."""
    scenes = [
        make_scene(FIRST_SEED + number, things=2 if number % _PAIRS_EVERY == 0 else 1)
        for number in range(pictures)
    ]
    chunks = [scenes[start : start + 64] for start in range(0, pictures, 64)]
    latents = torch.cat([pipeline.vae.encoder(render(chunk)) for chunk in chunks])
    classes = {
        name: torch.tensor([_class_of(scene, name) for scene in scenes])
        for name in HEADS
        if name != "minority"
    }
    scores = torch.cat([_distance_restored(pipeline, chunk) for chunk in latents.split(64)])
    ranks = scores.argsort().argsort()
    classes["minority"] = ranks * len(HEADS["minority"]) // pictures
    # Tensors created in inference mode cannot be used in training.
    return Labeled(latents.clone(), classes)


def _class_of(scene: Scene, attribute: str) -> int:
    if attribute == "count":
        return len(scene.truth.things) - 1
    if attribute == "background":
        return HEADS["background"].index(scene.truth.background or "")
    thing, *others = scene.truth.things
    return _UNKNOWN if others else HEADS[attribute].index(getattr(thing, attribute))


def _distance_restored(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Mean square distance of latents from the model's own restoration of them, ``[rows]``.

    Latents are restored without a prompt from nearly pure noise. The paper measures the perceptual
    distance of pictures; this is the distance of latents.
    """
    square = float(make_scheduler().alphas_cumprod[_RESTORED_FROM])
    alpha, sigma = square**0.5, (1 - square) ** 0.5
    generator = torch.Generator().manual_seed(0)
    text, _ = pipeline.encode_prompt([""] * len(latents), "cpu", 1, False)
    noise = torch.randn(latents.shape, generator=generator)
    x = alpha * latents + sigma * noise
    velocity = pipeline.unet(x, _RESTORED_FROM, text, return_dict=False)[0]
    return (alpha * x - sigma * velocity - latents).square().mean((1, 2, 3))


def train_classifier(
    data: Labeled, model: str, steps: int, seed: int, on_step: Callable[[int, float], None]
) -> LatentClassifier:
    """Train at random noise levels, with cross-entropy over all known attributes.

    Args:
        data: labeled latents.
        model: revision of the model that the latents belong to.
        steps: number of steps of Adam, with batches of 96.
        seed: seed of all random numbers.
        on_step: called with step and loss from time to time.
    """
    torch.manual_seed(seed)
    classifier = LatentClassifier(data.latents.shape[1], HEADS, model)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(data.latents), (_BATCH,))
        alpha, sigma = _levels(_BATCH)
        loss = _loss(classifier, data, chosen, alpha, sigma)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            on_step(step, float(loss.detach()))
    return classifier.eval().requires_grad_(requires_grad=False)


@torch.inference_mode()
def accuracy(classifier: LatentClassifier, data: Labeled, timestep: int | None) -> dict[str, float]:
    """Accuracy by attribute, at the noise level of a timestep or on clean latents (None)."""
    rows = len(data.latents)
    square = torch.ones(()) if timestep is None else make_scheduler().alphas_cumprod[timestep]
    alpha, sigma = square.sqrt().expand(rows), (1 - square).sqrt().expand(rows)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(data.latents.shape, generator=generator)
    x = alpha.view(-1, 1, 1, 1) * data.latents + sigma.view(-1, 1, 1, 1) * noise
    logits = classifier(x, alpha, sigma)
    shares: dict[str, float] = {}
    for name, classes in data.classes.items():
        known = classes != _UNKNOWN
        shares[name] = float((logits[name].argmax(1) == classes)[known].float().mean())
    return shares


def _levels(rows: int) -> tuple[Tensor, Tensor]:
    squares = make_scheduler().alphas_cumprod
    square = squares[torch.randint(len(squares), (rows,))]
    square = square.where(torch.rand(rows) > _CLEAN, 1.0)
    return square.sqrt(), (1 - square).sqrt()


def _loss(
    classifier: LatentClassifier, data: Labeled, chosen: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    clean = data.latents[chosen]
    noise = torch.randn_like(clean)
    x = alpha.view(-1, 1, 1, 1) * clean + sigma.view(-1, 1, 1, 1) * noise
    logits = classifier(x, alpha, sigma)
    losses = [
        F.cross_entropy(logits[name], classes[chosen], ignore_index=_UNKNOWN)
        for name, classes in data.classes.items()
    ]
    return torch.stack(losses).sum()
