"""Train the U-Net and the text encoder together on cached latents, with v-prediction."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from embedded.checkpoint import RunningAverage, TrainingState, save
from embedded.components import (
    Components,
    make_scheduler,
    make_tokenizer,
)
from embedded.precision import autocast
from embedded.scenes import make_scene, recaption, render
from embedded.schedule import TrainingClock

CAPTIONS_PER_PICTURE: Final = 4

_PEAK_RATE: Final = 1e-3
_MIN_RATE: Final = 0.03
_WARM_UP_STEPS: Final = 300
_AVERAGE_DECAY: Final = 0.999
_CAPTION_DROPOUT: Final = 0.1
_STRANGE_WORDS: Final = 0.03
"""Fraction of captions with a word unknown to the tokenizer, so that the model learns to ignore it.
"""
_SNR_BOUND: Final = 6.0


@dataclass(frozen=True, slots=True)
class UNetSettings:
    """Training settings; `steps` or `minutes` end the run, `publish_minutes` separates previews."""

    steps: int | None
    minutes: float | None
    batch: int
    pictures: int
    device: str
    seed: int
    publish_minutes: float


@dataclass(frozen=True, slots=True)
class Corpus:
    """Latents [pictures, C, h, w] float16 and tokens [pictures, captions, tokens] uint8."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor


def training_captions(pictures: int) -> list[list[str]]:
    """The captions of each training picture."""
    return [
        [recaption(make_scene(seed), variant)[0] for variant in range(CAPTIONS_PER_PICTURE)]
        for seed in range(pictures)
    ]


@torch.no_grad()
def make_corpus(autoencoder: AutoencoderTiny, pictures: int, device: str) -> Corpus:
    """Draw, encode and tokenize the training pictures, whose seeds start at 0."""
    latents: list[Tensor] = []
    nn.Module.to(autoencoder, device)
    for start in range(0, pictures, 64):
        scenes = [make_scene(seed) for seed in range(start, min(start + 64, pictures))]
        latents.append(autoencoder.encoder(render(scenes, device)).half().cpu())
        if start % 4096 == 0:
            print(f"encoding pictures: {start} of {pictures}", flush=True)
    captions = training_captions(pictures)
    rng = np.random.default_rng(0)
    strange = [[_with_strange_word(text, rng) for text in texts] for texts in captions]
    tokens = tokens_of([text for texts in strange for text in texts])
    return Corpus(
        torch.cat(latents),
        tokens.view(pictures, CAPTIONS_PER_PICTURE, -1).to(torch.uint8),
        tokens_of([""])[0],
    )


def _with_strange_word(text: str, rng: np.random.Generator) -> str:
    if rng.random() >= _STRANGE_WORDS:
        return text
    words = text.split(" ")
    words.insert(int(rng.integers(len(words) + 1)), "x" * int(rng.integers(2, 6)))
    return " ".join(words)


def tokens_of(texts: list[str]) -> Tensor:
    """Token numbers of texts ``[texts, tokens]``."""
    tokenizer = make_tokenizer()
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def train_unet(
    components: Components,
    settings: UNetSettings,
    folder: Path,
    publish: Callable[[Components, int], None],
) -> Components:
    """Train, or resume from the folder's checkpoint; returns the averaged components.

    The autoencoder is not trained, nor is a text encoder whose parameters need no gradient.
    `publish` gets the averaged components and the step from time to time and at the end.
    """
    torch.manual_seed(settings.seed)
    autoencoder, unet, text_encoder = (
        components.autoencoder,
        components.unet,
        components.text_encoder,
    )
    # On a CPU the backward pass of fused attention takes twice as long as that of plain attention.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    model = nn.ModuleList([unet, text_encoder]).to(settings.device)
    result = Components(autoencoder, copy.deepcopy(unet), copy.deepcopy(text_encoder))
    average = nn.ModuleList([result.unet, result.text_encoder]).requires_grad_(requires_grad=False)
    averaging = RunningAverage(model, average, _AVERAGE_DECAY)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    clock = TrainingClock(settings.steps, settings.minutes)
    state = TrainingState({"model": model, "average": average}, optimizer, clock)
    checkpoint = folder / "unet.safetensors"
    if checkpoint.exists():
        state.restore(checkpoint, settings.device)
    corpus = corpus_of(
        autoencoder, settings.pictures, settings.device, folder / "corpus.safetensors"
    )
    rng = torch.Generator().manual_seed(settings.seed + clock.step)
    published_s, losses = clock.elapsed_s, []
    while clock.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(_PEAK_RATE, warm_up=_WARM_UP_STEPS, floor=_MIN_RATE)
        losses.append(_loss(unet, text_encoder, corpus, rng, settings))
        losses[-1].backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step += 1
        averaging.update(clock.step)
        if clock.step % 200 == 0:
            mean = float(torch.stack(losses).detach().mean())
            minutes = clock.elapsed_s / 60
            print(f"unet step {clock.step} minute {minutes:.1f} loss {mean:.4f}", flush=True)
            losses.clear()
        if clock.step % 500 == 0:
            state.store(checkpoint)
        if clock.elapsed_s - published_s > 60 * settings.publish_minutes:
            publish(result, clock.step)
            published_s = clock.elapsed_s
    state.store(checkpoint)
    publish(result, clock.step)
    return result


def corpus_of(autoencoder: AutoencoderTiny, pictures: int, device: str, file: Path) -> Corpus:
    """Training latents and tokens, from the file if it holds as many, else created and stored."""
    if file.exists():
        content = load_file(file)
        if len(content["latents"]) == pictures:
            return Corpus(content["latents"], content["tokens"], content["empty"])
    corpus = make_corpus(autoencoder, pictures, device)
    save({"latents": corpus.latents, "tokens": corpus.tokens, "empty": corpus.empty}, file)
    return corpus


def _loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    corpus: Corpus,
    rng: torch.Generator,
    settings: UNetSettings,
) -> Tensor:
    """Weighted mean square error of v = alpha noise - sigma x at stratified timesteps.

    The weight min(snr + 1, 6) / (snr + 1) preserves high noise, where colors and places are
    determined, and reduces the influence of low noise, where v is nearly the noise.
    """
    batch, device = settings.batch, settings.device
    chosen = torch.randint(len(corpus.latents), (batch,), generator=rng)
    variant = torch.randint(corpus.tokens.shape[1], (batch,), generator=rng)
    tokens = corpus.tokens[chosen, variant].long()
    dropped = torch.rand(batch, generator=rng) < _CAPTION_DROPOUT
    tokens[dropped] = corpus.empty
    clean = corpus.latents[chosen].float().to(device)
    noise = torch.randn(clean.shape, generator=rng).to(device)
    alpha_squares = make_scheduler().alphas_cumprod
    share = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
    times = (share * len(alpha_squares)).long()
    alpha_square = alpha_squares[times].to(device)[:, None, None, None]
    alpha, sigma = alpha_square.sqrt(), (1 - alpha_square).sqrt()
    with autocast(device):
        states = text_encoder(tokens.to(device)).last_hidden_state
        noisy = alpha * clean + sigma * noise
        (predicted,) = unet(noisy, times.to(device), states, return_dict=False)
    error = (predicted.float() - (alpha * noise - sigma * clean)).square().mean((1, 2, 3))
    # With alpha squared plus sigma squared 1, snr + 1 is 1 / sigma squared.
    weight = (_SNR_BOUND * sigma.square()).clamp(max=1).flatten()
    return (weight * error).mean()
