"""Train only the decoder, so that the latents and everything that depends on them do not change.

Half of the latents are the encoder's with a little noise. The others were noised and restored by
the U-Net, from timesteps low enough that the scene does not move. Restored latents differ from
encoded ones, and the decoder learns to draw straight lines from them all the same.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from embedded.captured import adam, captured, set_rate
from embedded.checkpoint import RunningAverage, TrainingState
from embedded.components import Components, make_autoencoder, make_scheduler
from embedded.consistency import AlphaSigma, guided, solved
from embedded.precision import autocast
from embedded.scenes import make_scene, render
from embedded.schedule import TrainingClock
from embedded.unet_training import tokens_of

BLOCKS: Final = (8, 7, 1, 1)
"""Numbers of residual blocks at 16, 32, 64 and 128 pixels; there are more where they are cheap."""

_LATEST: Final = 400
"""Upper bound of timesteps that latents are restored from; above it things move."""
_SOLVER_STEPS: Final = 8
_SCALES: Final = (1.0, 6.0)
"""Range of guidance scales for restoring latents."""
_DROPPED: Final = 0.15
"""Fraction of the restored latents that is discarded: those that moved most."""
_LATENT_NOISE: Final = 0.1
_WARM_UP_STEPS: Final = 200
_MIN_RATE: Final = 0.01
_AVERAGE_DECAY: Final = 0.999
_FIRST_SCENE: Final = 6_000_000_000
_SAID_EVERY: Final = 500
_STORED_EVERY: Final = 5000


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """Training settings; `steps` or `minutes` end the run, `pictures` are drawn and restored."""

    steps: int | None
    minutes: float | None
    batch: int
    rate: float
    pictures: int
    device: str
    seed: int


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pictures ``[n, 3, 128, 128]`` uint8 and latents of each ``[n, 2, C, h, w]`` float16."""

    pictures: Tensor
    latents: Tensor


def deepened(autoencoder: AutoencoderTiny, blocks: tuple[int, ...] = BLOCKS) -> AutoencoderTiny:
    """The same autoencoder with these numbers of residual blocks per level of the decoder.

    Added blocks are the identity at first, so that training starts from the current pictures.
    """
    result = make_autoencoder(blocks)
    result.encoder.load_state_dict(autoencoder.encoder.state_dict())
    own = iter(autoencoder.decoder.layers)
    current = next(own)
    for layer in result.decoder.layers:
        if type(layer) is type(current):
            layer.load_state_dict(current.state_dict())
            current = next(own, nn.Identity())
        elif isinstance(layer, AutoencoderTinyBlock):
            for parameter in layer.conv[-1].parameters():
                nn.init.zeros_(parameter)
        else:
            raise ValueError(f"blocks is {blocks}, which is fewer than there are.")
    return result


def train_decoder(
    components: Components,
    settings: DecoderSettings,
    checkpoint: Path,
) -> AutoencoderTiny:
    """Train, or resume from the checkpoint; returns the running average."""
    torch.manual_seed(settings.seed)
    device = settings.device
    model = deepened(components.autoencoder)
    nn.Module.to(model, device)
    average = copy.deepcopy(model).requires_grad_(requires_grad=False)
    averaging = RunningAverage(model.decoder, average.decoder, _AVERAGE_DECAY)
    optimizer = adam(model.decoder.parameters(), settings.rate, (0.9, 0.99), device)
    clock = TrainingClock(settings.steps, settings.minutes)
    state = TrainingState({"model": model, "average": average}, optimizer, clock)
    if checkpoint.exists():
        state.restore(checkpoint, device)
    pairs = make_pairs(components, settings)
    chosen = torch.zeros(settings.batch, dtype=torch.long, device=device)
    which = torch.zeros_like(chosen)
    rng = torch.Generator(device).manual_seed(settings.seed + clock.step)

    def draw() -> None:
        chosen.random_(len(pairs.pictures), generator=rng)
        which.random_(pairs.latents.shape[1], generator=rng)

    def step() -> Tensor:
        pictures = pairs.pictures[chosen].float() / 127.5 - 1
        latents = pairs.latents[chosen, which].float()
        level = _LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=device)
        noisy = latents + level * torch.randn_like(latents)
        with autocast(device):
            decoded = model.decoder(noisy)
        loss = _loss(decoded.float(), pictures)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    draw()
    run = captured(step, device)
    total = torch.zeros((), device=device)
    while clock.progress < 1:
        rate = clock.rate(settings.rate, warm_up=_WARM_UP_STEPS, floor=_MIN_RATE)
        set_rate(optimizer, rate)
        draw()
        total += run()
        clock.step += 1
        averaging.update(clock.step)
        if clock.step % _SAID_EVERY == 0:
            minutes, mean = clock.elapsed_s / 60, float(total) / _SAID_EVERY
            print(f"decoder step {clock.step} minute {minutes:.1f} loss {mean:.5f}", flush=True)
            total.zero_()
        if clock.step % _STORED_EVERY == 0:
            state.store(checkpoint)
    state.store(checkpoint)
    return average


def _loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute and square error, and the absolute error of differences between neighbors.

    The last term makes edges sharp and straight; the first alone would accept soft ones.
    """
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


@torch.no_grad()
def make_pairs(components: Components, settings: DecoderSettings) -> _Pairs:
    """Draw pictures, and give each its encoded latents and latents restored by the U-Net."""
    device = settings.device
    for part in (components.autoencoder, components.unet, components.text_encoder):
        nn.Module.to(part, device)
    alphas = make_scheduler().alphas_cumprod
    levels = AlphaSigma.of(alphas, device)
    rng = torch.Generator(device).manual_seed(settings.seed)
    pictures: list[Tensor] = []
    latents: list[Tensor] = []
    rows = min(512, settings.pictures)
    empty = components.text_encoder(tokens_of([""]).to(device)).last_hidden_state
    for start in range(0, settings.pictures, rows):
        scenes = [make_scene(_FIRST_SCENE + start + number) for number in range(rows)]
        drawn = torch.cat([render(scenes[i : i + 64], device) for i in range(0, rows, 64)])
        clean = torch.cat([components.autoencoder.encoder(part) for part in drawn.split(64)])
        tokens = tokens_of([scene.caption for scene in scenes]).to(device)
        text = components.text_encoder(tokens).last_hidden_state
        scales = torch.empty(rows, device=device).uniform_(*_SCALES, generator=rng)
        times = torch.randint(40, _LATEST, (rows,), generator=rng, device=device)
        noise = torch.randn(clean.shape, generator=rng, device=device)
        alpha, sigma = levels.at(times)

        teacher = guided(components.unet, empty, text, scales)
        with autocast(device):
            restored, _ = solved(
                teacher, alpha * clean + sigma * noise, times, _LATEST, _SOLVER_STEPS, levels
            )
        moved = (restored - clean).abs().mean((1, 2, 3))
        kept = moved.argsort()[: int(rows * (1 - _DROPPED))]
        pictures.append(((drawn[kept] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        latents.append(torch.stack([clean[kept], restored[kept]], 1).half())
        if start % (16 * rows) == 0:
            print(f"restored {start + rows} of {settings.pictures}", flush=True)
    return _Pairs(torch.cat(pictures), torch.cat(latents))
