"""Samples of a model's data: captioned pictures of a folder, or pictures that the model draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samplers import NoiseSchedule, integrate, preconditioning
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.timesteps import Trailing
from server.decoding.sizing import fit
from server.engine.state.noise import start_noise
from server.errors import InvalidRequest
from server.models.folder import prompts_file
from server.models.hosted import HostedModel

__all__ = ["Samples", "draw", "prompts_for", "read_pictures"]

PICTURES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp"})

PROMPTS: Final = (
    "a lighthouse on a cliff at dawn",
    "portrait of an old fisherman, oil painting",
    "a bowl of ramen with a soft-boiled egg",
    "a fox asleep in autumn leaves",
    "an empty subway station at night",
    "a watercolour of a mountain village",
    "macro photograph of a dandelion",
    "a red bicycle leaning on a brick wall",
    "a spaceship landing in a desert, concept art",
    "two children flying a kite on a beach",
    "a glass of water on a wooden table",
    "aerial view of rice terraces",
    "a knight in rusted armour, dramatic light",
    "a cat looking out of a rainy window",
    "line drawing of a sleeping dog",
    "a bustling market in Marrakesh",
    "a snow-covered pine forest in fog",
    "an astronaut playing the cello",
    "a stack of old books and a candle",
    "a hummingbird at a purple flower",
    "a modern kitchen with white tiles",
    "a steam train crossing a stone bridge",
    "a woman reading in a cafe, film photograph",
    "abstract shapes in blue and orange",
)
"""Prompts for models that have none of their own."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Clean latents ``[K, C, h, w]`` float32, and the prompt of each."""

    latents: Tensor
    prompts: Sequence[str]


def read_pictures(model: HostedModel, folder: Path, count: int, chunk: int) -> Samples:
    """Read the first pictures of a folder, at the model's own size, with their captions.

    Args:
        model: model that encodes them.
        folder: folder of pictures, each beside a text file of the same name.
        count: number of samples; pictures are repeated if there are fewer.
        chunk: number of pictures encoded at once.

    Raises:
        InvalidRequest: there are no pictures, one cannot be read, or one lacks its caption.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)[:count]
    if not files:
        raise InvalidRequest("data", f"data is {str(folder)!r}, which contains no pictures.")
    for file in files:
        if not file.with_suffix(".txt").is_file():
            raise InvalidRequest(
                "data", f"data has no caption {file.with_suffix('.txt').name!r} for {file.name!r}."
            )
    latents = torch.cat(
        [_encoded(model, files[start : start + chunk]) for start in range(0, len(files), chunk)]
    )
    numbers = [k % len(files) for k in range(count)]
    captions = [_text("data", file.with_suffix(".txt")).strip() for file in files]
    return Samples(latents[numbers], [captions[k] for k in numbers])


def prompts_for(folder: Path, file: Path | None) -> Sequence[str]:
    """Prompts for a model: the lines of a file, else the model's own, else general ones.

    Args:
        folder: folder of the model, which may hold suitable prompts in ``weft/prompts.txt``.
        file: file with one prompt per line.

    Raises:
        InvalidRequest: the file has no lines.
    """
    own = prompts_file(folder)
    if file is None and not own.is_file():
        return PROMPTS
    chosen = file or own
    lines = [line.strip() for line in _text("prompts", chosen).splitlines()]
    if not any(lines):
        raise InvalidRequest("prompts", f"prompts is {str(chosen)!r}, which contains no lines.")
    return [line for line in lines if line]


def _text(field: str, file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(
            field, f"{field} has {str(file)!r}, which is not UTF-8 text."
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise InvalidRequest(
            field, f"{field} has {str(file)!r}, which cannot be read: {reason}."
        ) from None


@torch.no_grad()
def draw(
    model: HostedModel,
    prompts: Sequence[str],
    count: int,
    *,
    scale: float,
    steps: int,
    chunk: int,
    on_progress: Callable[[int], None],
) -> Samples:
    """Let the model draw its own samples, at its own size, with DPM-Solver++ 2M.

    Args:
        model: model that draws.
        prompts: prompts, taken in turn.
        count: number of samples.
        scale: guidance scale, 1 for none.
        steps: number of steps of the sampler.
        chunk: number of samples drawn at once.
        on_progress: callback, called with the number of samples that are done.
    """
    facts = model.facts
    shape = model.default_shape
    schedule = model.schedule(facts.default_width, facts.default_height, steps)
    plan = DPMSolverPP().plan(schedule.grid(Trailing(), steps))
    chosen = [prompts[k % len(prompts)] for k in range(count)]
    drawn: list[Tensor] = []
    numbers = iter(range(count))
    while rows := list(islice(numbers, chunk)):
        noise = torch.stack([start_noise(k, shape) for k in rows]).to(model.device)
        denoise = _guided(model, schedule, [chosen[k] for k in rows], scale)
        drawn.append(integrate(plan, denoise, plan.start_scale * noise))
        on_progress(rows[-1] + 1)
    return Samples(torch.cat(drawn), chosen)


def _guided(
    model: HostedModel, schedule: NoiseSchedule, prompts: Sequence[str], scale: float
) -> Callable[[Tensor, float], Tensor]:
    """The denoiser with classifier-free guidance."""
    facts = model.facts
    both = [*prompts] if scale == 1 else [*prompts, *[None] * len(prompts)]
    inputs = model.inputs(both)

    def denoise(x: Tensor, t: float) -> Tensor:
        time = np.array(t)
        scale_in, skip, out = preconditioning(facts.prediction, *schedule.level(time))
        rows = (float(scale_in) * x).repeat(len(both) // len(x), 1, 1, 1)
        network_t = x.new_full((len(both),), float(model.network_time(time)))
        raw = model.evaluate(rows, network_t, inputs).view(-1, *x.shape)
        return float(skip) * x + float(out) * torch.lerp(raw[-1], raw[0], scale)

    return denoise


@torch.no_grad()
def _encoded(model: HostedModel, files: Sequence[Path]) -> Tensor:
    width, height = model.facts.default_width, model.facts.default_height
    pixels: list[Tensor] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                fitted = torch.tensor(np.asarray(fit(picture.convert("RGB"), width, height)))
        except (OSError, Image.DecompressionBombError) as error:
            raise InvalidRequest("data", f"{file.name!r} cannot be read: {error}.") from None
        pixels.append(fitted.permute(2, 0, 1).float().div(127.5).sub(1))
    return model.encode_image(torch.stack(pixels).to(model.device))
