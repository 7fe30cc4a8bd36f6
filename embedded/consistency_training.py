"""Train a U-Net to jump along the guided teacher's probability flow (arXiv 2310.04378)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from embedded.captured import adam, captured, set_rate
from embedded.checkpoint import RunningAverage, TrainingState
from embedded.components import Components, make_scheduler, make_unet
from embedded.consistency import AlphaSigma, consistency, distance, guided, solved
from embedded.precision import autocast
from embedded.schedule import TrainingClock
from embedded.unet_training import Corpus
from server.models.unet_model import embedding_of_scales

TIMES: Final = 50
"""Number of times at which the student is trained, equally spaced, as in LCM."""
SCALE_FEATURES: Final = 64
"""Size of the embedding of the guidance scale."""

_MIN_RATE: Final = 0.02
_WARM_UP_STEPS: Final = 200
_CAPTION_DROPOUT: Final = 0.05
_SAID_EVERY: Final = 500


@dataclass(frozen=True, slots=True)
class Distillation:
    """Settings; `steps` or `minutes` end the run, and `publish_minutes` separates previews.

    Attributes:
        scales: least and greatest guidance scale of the teacher.
        intervals: number of the 50 times by which the target is nearer to the clean picture.
        solver_steps: number of the teacher's DDIM steps over these intervals.
        loss: kind of distance from the target.
        width: width of that distance, in units of a latent's standard deviation.
        target_decay: decay of the running average that targets come from.
        average_decay: decay of the running average that is kept.
    """

    steps: int | None
    minutes: float | None
    batch: int
    rate: float
    scales: tuple[float, float]
    intervals: int
    solver_steps: int
    loss: Literal["cauchy", "huber"]
    width: float
    target_decay: float
    average_decay: float
    device: str
    seed: int
    publish_minutes: float


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an embedding of the guidance scale that has no effect at first."""
    student = make_unet(scale_features=SCALE_FEATURES)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if missing != ["time_embedding.cond_proj.weight"] or unexpected:
        raise ValueError(f"the teacher is another network: {[*missing, *unexpected]}")
    nn.init.zeros_(student.get_parameter(missing[0]))
    return student


class _Batch:
    """The random inputs of a step: always the same tensors, refilled for each step."""

    def __init__(self, corpus: Corpus, settings: Distillation, last_time: int) -> None:
        rows, device = settings.batch, settings.device
        self._pictures, self._captions = corpus.tokens.shape[:2]
        self._scales = settings.scales
        self._stride = (last_time + 1) // TIMES
        self._rng = torch.Generator(device)
        self.chosen = torch.zeros(rows, dtype=torch.long, device=device)
        self.variant = torch.zeros(rows, dtype=torch.long, device=device)
        self.times = torch.zeros(rows, dtype=torch.long, device=device)
        self.scales = torch.zeros(rows, device=device)
        self.dropped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.noise = torch.zeros(rows, *corpus.latents.shape[1:], device=device)

    def seed(self, seed: int) -> None:
        self._rng.manual_seed(seed)

    def draw(self) -> None:
        """Refill all tensors; times are stratified."""
        rng, rows, device = self._rng, len(self.chosen), self.chosen.device
        chance, within = torch.rand(2, rows, generator=rng, device=device)
        self.chosen.random_(self._pictures, generator=rng)
        self.variant.random_(self._captions, generator=rng)
        interval = ((torch.arange(rows, device=device) + within) / rows * TIMES).long()
        self.times.copy_((interval.clamp(max=TIMES - 1) + 1) * self._stride - 1)
        self.dropped.copy_(chance < _CAPTION_DROPOUT)
        self.scales.uniform_(*self._scales, generator=rng)
        self.noise.normal_(generator=rng)


def distil(
    teacher: Components,
    student: UNet2DConditionModel,
    settings: Distillation,
    corpus: Corpus,
    checkpoint: Path,
    publish: Callable[[UNet2DConditionModel, int], None],
) -> UNet2DConditionModel:
    """Train the student, or resume from the checkpoint; returns its running average.

    Parameters that need no gradient are not trained. A student with a `time_cond_proj_dim` is
    conditioned on the guidance scale. `publish` gets the average and the step from time to time and
    at the end.
    """
    device = settings.device
    torch.manual_seed(settings.seed)
    nn.Module.to(teacher.unet, device)
    nn.Module.to(student, device)
    teacher.unet.requires_grad_(requires_grad=False)
    target = copy.deepcopy(student).requires_grad_(requires_grad=False)
    average = copy.deepcopy(target)
    averages = [
        RunningAverage(student, target, settings.target_decay),
        RunningAverage(student, average, settings.average_decay),
    ]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = adam(trained, settings.rate, (0.9, 0.98), device)
    clock = TrainingClock(settings.steps, settings.minutes)
    modules: dict[str, nn.Module] = {"student": student, "target": target, "average": average}
    state = TrainingState(modules, optimizer, clock)
    if checkpoint.exists():
        state.restore(checkpoint, device)
    batch, step = _step(teacher, student, target, settings, corpus, optimizer, trained)
    batch.seed(settings.seed + clock.step)
    batch.draw()
    run = captured(step, device)
    total, published_s = torch.zeros((), device=device), clock.elapsed_s
    while clock.progress < 1:
        rate = clock.rate(settings.rate, warm_up=_WARM_UP_STEPS, floor=_MIN_RATE)
        set_rate(optimizer, rate)
        batch.draw()
        total += run()
        clock.step += 1
        for averaging in averages:
            averaging.update(clock.step)
        if clock.step % _SAID_EVERY == 0:
            minutes = clock.elapsed_s / 60
            mean = float(total) / _SAID_EVERY
            print(f"step {clock.step} minute {minutes:.1f} loss {mean:.5f}", flush=True)
            total.zero_()
        if clock.elapsed_s - published_s > 60 * settings.publish_minutes:
            state.store(checkpoint)
            publish(average, clock.step)
            published_s = clock.elapsed_s
    state.store(checkpoint)
    publish(average, clock.step)
    return average


def _step(
    teacher: Components,
    student: UNet2DConditionModel,
    target: UNet2DConditionModel,
    settings: Distillation,
    corpus: Corpus,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
) -> tuple[_Batch, Callable[[], Tensor]]:
    """The random inputs of a step, and the step itself, which returns its loss."""
    device = settings.device
    alphas = make_scheduler().alphas_cumprod
    levels = AlphaSigma.of(alphas, device)
    batch = _Batch(corpus, settings, len(alphas) - 1)
    span = settings.intervals * (len(alphas) // TIMES)
    latents = corpus.latents.to(device)
    captions = _states(teacher.text_encoder, corpus.tokens.flatten(0, 1), device)
    empty = _states(teacher.text_encoder, corpus.empty[None], device)
    width = corpus.tokens.shape[1]

    def step() -> Tensor:
        text = captions[batch.chosen * width + batch.variant]
        text = torch.where(batch.dropped[:, None, None], empty, text).float()
        alpha, sigma = levels.at(batch.times)
        x = alpha * latents[batch.chosen].float() + sigma * batch.noise
        kwargs = _scale_kwargs(student, batch.scales)
        taught = guided(teacher.unet, empty.float(), text, batch.scales)
        with torch.no_grad(), autocast(device):
            there, reached = solved(taught, x, batch.times, span, settings.solver_steps, levels)
            v = target(there, reached.clamp(min=0), text, return_dict=False, **kwargs)[0]
            goal = consistency(v.float(), there, reached, levels)
        with autocast(device):
            v = student(x, batch.times, text, return_dict=False, **kwargs)[0]
        found = consistency(v.float(), x, batch.times, levels)
        loss = distance(found, goal, settings.loss, settings.width)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    return batch, step


def _scale_kwargs(student: UNet2DConditionModel, scales: Tensor) -> dict[str, Tensor]:
    size: int | None = dict(student.config)["time_cond_proj_dim"]
    return {} if size is None else {"timestep_cond": embedding_of_scales(scales - 1, size)}


@torch.no_grad()
def _states(text_encoder: CLIPTextModel, tokens: Tensor, device: str) -> Tensor:
    """Text states of captions for the U-Net: ``[captions, tokens, features]`` bfloat16."""
    nn.Module.to(text_encoder, device)
    return torch.cat(
        [
            text_encoder(part.long().to(device)).last_hidden_state.bfloat16()
            for part in tokens.split(512)
        ]
    )
