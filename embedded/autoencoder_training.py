"""Train the autoencoder on crops of pictures, then whiten its latents.

Without group normalization, a network trained on crops treats whole pictures in the same way, and
crops can be chosen so that they contain edges far more often than random parts of a picture.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from embedded.checkpoint import TrainingState
from embedded.components import make_autoencoder
from embedded.precision import autocast
from embedded.scenes import PICTURE_SIZE, Scene, make_scene, render
from embedded.schedule import TrainingClock

CROP_SIZE: Final = 64
"""Height and width of a training crop, in pixels."""

_PEAK_RATE: Final = 1e-3
_FINE_TUNING_RATE: Final = 3e-4
_LATENT_NOISE: Final = 0.1
"""Maximum standard deviation of the noise added to a crop's latents, so that the decoder tolerates
the errors of a denoiser."""


@dataclass(frozen=True, slots=True)
class AutoencoderSettings:
    """Training settings. `steps` or `minutes` end the main part; fine-tuning adds a fifth.

    `pictures` is the number of pictures in the pool for crops, and also of those used for
    whitening.
    """

    steps: int | None
    minutes: float | None
    batch: int
    pictures: int
    device: str
    seed: int


class CropPool:
    """Random crops from a pool of pictures, parts of which are redrawn during the training."""

    def __init__(self, seed: int, device: str, pictures: int) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        self._next_seed = seed * 1_000_003 + 1_000_000_000
        self._device = device
        self._scenes: list[Scene] = [self._fresh() for _ in range(pictures)]
        self._pictures = torch.cat(
            [render(self._scenes[i : i + 64], device) for i in range(0, pictures, 64)]
        )

    def _fresh(self) -> Scene:
        self._next_seed += 1
        return make_scene(self._next_seed)

    def refresh(self, count: int) -> None:
        """Redraw that many of the pictures."""
        chosen = torch.randperm(len(self._scenes), generator=self._rng)[:count].tolist()
        scenes = [self._fresh() for _ in chosen]
        for number, scene in zip(chosen, scenes, strict=True):
            self._scenes[number] = scene
        self._pictures[chosen] = render(scenes, self._device)

    def crops(self, count: int) -> Tensor:
        """[count, 3, 64, 64] in [-1, 1]; most have an edge, some permuted color channels."""
        limit = PICTURE_SIZE - CROP_SIZE
        numbers = torch.randint(len(self._scenes), (count,), generator=self._rng).tolist()
        chance = torch.rand(count, 4, generator=self._rng).tolist()
        found: list[Tensor] = []
        for number, (edge, which, angle, colours) in zip(numbers, chance, strict=True):
            outlines = self._scenes[number].outlines
            outline = outlines[int(which * len(outlines))]
            reach = outline.radius if edge < 0.85 else PICTURE_SIZE
            turn = 2 * math.pi * angle
            left = int(outline.x + reach * math.cos(turn)) - CROP_SIZE // 2
            top = int(outline.y + reach * math.sin(turn)) - CROP_SIZE // 2
            left, top = min(max(left, 0), limit), min(max(top, 0), limit)
            crop = self._pictures[number, :, top : top + CROP_SIZE, left : left + CROP_SIZE]
            if colours < 0.2:
                crop = crop[torch.randperm(3, generator=self._rng)]
            found.append(crop)
        return torch.stack(found)


def train_autoencoder(settings: AutoencoderSettings, checkpoint: Path) -> AutoencoderTiny:
    """Train (or resume from the checkpoint), whiten the latents, and fine-tune the decoder."""
    torch.manual_seed(settings.seed)
    model = make_autoencoder()
    nn.Module.to(model, settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    clock = TrainingClock(settings.steps, settings.minutes)
    state = TrainingState({"model": model}, optimizer, clock)
    if checkpoint.exists():
        state.restore(checkpoint, settings.device)
    pool = CropPool(settings.seed + clock.step, settings.device, settings.pictures)
    while clock.progress < 1:
        errors = _step(model, pool, optimizer, clock, settings, peak=_PEAK_RATE)
        if clock.step % 100 == 0:
            _say("autoencoder", clock, errors)
            pool.refresh(32)
        if clock.step % 500 == 0 or clock.progress >= 1:
            state.store(checkpoint)
    whiten(model, settings.device, settings.pictures)
    _fine_tune(model, pool, settings)
    return model


def _fine_tune(model: AutoencoderTiny, pool: CropPool, settings: AutoencoderSettings) -> None:
    """Adapt only the decoder to the whitened latents, on which its soft clamp acts differently."""
    model.encoder.requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), betas=(0.9, 0.99), weight_decay=0)
    clock = TrainingClock(
        math.ceil(settings.steps / 5) if settings.steps else None,
        settings.minutes / 5 if settings.minutes else None,
    )
    while clock.progress < 1:
        errors = _step(model, pool, optimizer, clock, settings, peak=_FINE_TUNING_RATE)
        if clock.step % 100 == 0:
            _say("decoder", clock, errors)
            pool.refresh(32)


def _say(stage: str, clock: TrainingClock, errors: Tensor) -> None:
    absolute, square, spread = errors.tolist()
    print(
        f"{stage} step {clock.step} minute {clock.elapsed_s / 60:.1f} "
        f"L1 {absolute:.4f} MSE {square:.5f} latent {spread:.3f}",
        flush=True,
    )


def _step(
    model: AutoencoderTiny,
    pool: CropPool,
    optimizer: torch.optim.Optimizer,
    clock: TrainingClock,
    settings: AutoencoderSettings,
    *,
    peak: float,
) -> Tensor:
    """One step; returns mean absolute and square error and the latents' distance from white."""
    for group in optimizer.param_groups:
        group["lr"] = clock.rate(peak, warm_up=200, floor=0.02)
    crops = pool.crops(settings.batch).contiguous(memory_format=torch.channels_last)
    with autocast(settings.device):
        latents = model.encoder(crops).float()
        level = _LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        noisy = latents + level * torch.randn_like(latents)
        decoded = model.decoder(noisy)
    difference = decoded.float() - crops
    absolute, square = difference.abs().mean(), difference.square().mean()
    spread = _distance_from_white(latents)
    (absolute + square + 0.01 * spread).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clock.step += 1
    return torch.stack([absolute, square, spread]).detach()


def _distance_from_white(latents: Tensor) -> Tensor:
    """Squared distance of the channels' mean from 0 and of their covariance from the identity."""
    cells = latents.movedim(1, 0).flatten(1)
    mean = cells.mean(1, keepdim=True)
    covariance = (cells - mean) @ (cells - mean).T / cells.shape[1]
    white = torch.eye(len(cells), device=cells.device)
    return (covariance - white).square().sum() + mean.square().sum()


@torch.no_grad()
def whiten(model: AutoencoderTiny, device: str, pictures: int) -> None:
    """Fold whitening, which gives latents mean 0 and covariance 1, into the outer convolutions.

    z' = W (z - m) is folded exactly into the encoder's last convolution; z = W^-1 z' + m is folded
    into the decoder's first one, exactly except for its soft clamp and the zero padding at the
    picture's border.
    """
    latents = torch.cat(
        [
            model.encoder(render([make_scene(2_000_000_000 + i + j) for j in range(16)], device))
            for i in range(0, pictures, 16)
        ]
    )
    cells = latents.movedim(1, 0).flatten(1).double()
    mean = cells.mean(1)
    # Symmetric (ZCA) whitening stays nearest to the latents that the decoder was trained on.
    values, vectors = torch.linalg.eigh(torch.cov(cells))
    to_white = (vectors * values.rsqrt()) @ vectors.T
    from_white = (vectors * values.sqrt()) @ vectors.T
    last, first = model.encoder.layers[-1], model.decoder.layers[0]
    if not (isinstance(last, nn.Conv2d) and isinstance(first, nn.Conv2d)):
        raise TypeError("the autoencoder does not begin and end its latents with a convolution")
    if last.bias is None or first.bias is None:
        raise TypeError("the convolutions beside the latents have no bias")
    kernel, bias = last.weight.double(), last.bias.double()
    last.weight.copy_(torch.einsum("oc,cikl->oikl", to_white, kernel))
    last.bias.copy_(to_white @ (bias - mean))
    kernel = first.weight.double()
    first.bias.add_((kernel.sum((2, 3)) @ mean).float())
    first.weight.copy_(torch.einsum("ockl,ci->oikl", kernel, from_white))
    spread = values.sqrt().tolist()
    print(f"latent deviations before whitening: {', '.join(f'{v:.2f}' for v in spread)}")
