"""Measure the accuracy of guidance rules, the history of CFG++, inversion, and oscillation.

    python -m studies.guidance.rules rules --captions 100
    python -m studies.guidance.rules histories --captions 100
    python -m studies.guidance.rules inversion --captions 12
    python -m studies.guidance.rules oscillation --captions 12

Prints one table. The pictures of a caption start from the same noise with every setting.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from embedded import MODEL_FOLDER
from embedded.checker import compare, read_picture
from embedded.report import unseen_scenes
from embedded.scenes import render, to_pixels
from guidance import (
    APG,
    CFG,
    TCFG,
    CFGPlusPlus,
    CFGRescale,
    CFGZeroStar,
    DynamicThresholding,
    FrequencyDecoupled,
    MagnitudeAware,
    Rule,
    guide,
    invert,
)
from samplers import Grid, Plan, Sampler, advance, preconditioning
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.timesteps import Trailing
from samplers.unipc import UniPC
from server.engine.state.noise import start_noise
from server.models.loading import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from embedded.scenes import Scene
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

RULES: Sequence[Rule] = (
    CFG(scale=1),
    CFG(scale=4),
    CFG(scale=10),
    APG(scale=10),
    CFGRescale(scale=10),
    CFGRescale(scale=10, space="noise"),
    CFGZeroStar(scale=4),
    CFGZeroStar(scale=4, zero_init=0),
    DynamicThresholding(scale=10),
    DynamicThresholding(scale=10, limit=1),
    TCFG(scale=10),
    FrequencyDecoupled(),
    MagnitudeAware(scale=10),
    CFGPlusPlus(scale=0.6),
)
FINER = 8
"""Number of parts into which the reference of the histories divides a step."""
COMPARED = 8
"""Number of captions for which there is a reference."""
FINE = 50
"""Number of steps with which few steps are compared, for oscillation."""


@dataclass(frozen=True, slots=True)
class Captions:
    """Scenes, the inputs for their captions and for the unconditional branch, and start noise."""

    scenes: list[Scene]
    both: RowInputs
    noise: Tensor

    @classmethod
    def of(cls, model: HostedModel, count: int) -> Captions:
        """Captions from the seeds of the model's report, half of one thing and half of two."""
        scenes = [
            scene for things in (1, 2) for scene in unseen_scenes(things, count // 2, frozenset())
        ]
        facts = model.facts
        shape = model.latent_shape(facts.default_width, facts.default_height)
        return cls(
            scenes,
            model.inputs([*(scene.caption for scene in scenes), *[None] * len(scenes)]),
            torch.stack([start_noise(seed, shape) for seed in range(len(scenes))]),
        )


def predictor(
    model: HostedModel, captions: Captions, *, guided: bool = True
) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """``(x, t) -> denoised predictions`` for the captions and for the empty prompt."""
    count = len(captions.scenes)
    inputs = captions.both if guided else captions.both.of(range(count))

    def predict(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = model.default_schedule.level(np.array(t))
        scales = preconditioning(model.facts.prediction, alpha, sigma)
        points = torch.cat([x, x]) if guided else x
        told = torch.full((len(points),), float(model.network_time(np.array(t))))
        raw = model.evaluate(float(scales.scale_in) * points, told, inputs)
        denoised = float(scales.skip) * points + float(scales.out) * raw
        return denoised[: len(x)], denoised[-len(x) :]

    return predict


def run(
    plan: Plan,
    predict: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    rule: Rule,
    x: Tensor,
    *,
    published_history: bool = False,
) -> Tensor:
    """A guided run; with ``published_history``, CFG++ stores Du instead of D in the history."""
    K = plan.slots
    columns = x.new_zeros(len(x), K + 2, *x.shape[1:])
    columns[:, 0] = x
    memory = None
    for i, table in enumerate(plan.tables):
        x = columns[:, 0].clone()
        cond, other = predict(x, float(plan.t[i]))
        others = [other] * len(rule.branches)
        progress = plan.step[i] / plan.steps
        result = guide(
            rule,
            cond,
            others,
            x,
            float(plan.alpha[i]),
            float(plan.sigma[i]),
            progress=progress,
            memory=memory,
        )
        memory = result.memory
        columns[:, 0], columns[:, K] = result.x, result.denoised
        tables = x.new_tensor(table).expand(len(x), *table.shape)
        columns[:, :K] = advance(columns, tables)
        if published_history:
            columns[:, 1] += other - result.denoised
    return columns[:, 0].clone()


def share_right(model: HostedModel, captions: Captions, latents: Tensor) -> float:
    """Fraction of the pictures that show what their caption says, according to the checker."""
    pictures = to_pixels(model.decode(latents))
    right = [
        all(compare(scene.claim, read_picture(picture)).values())
        for scene, picture in zip(captions.scenes, pictures, strict=True)
    ]
    return sum(right) / len(right)


def rules(model: HostedModel, count: int, steps: int) -> None:
    """Accuracy and spread of every rule."""
    captions = Captions.of(model, count)
    plan = DPMSolverPP().plan(model.default_schedule.grid(Trailing(), steps))
    print("| rule | all right | latents' deviation | 99.5 % of them within |")
    print("|---|---|---|---|")
    for rule in RULES:
        predict = predictor(model, captions, guided=bool(rule.branches))
        latents = run(plan, predict, rule, captions.noise)
        deviation = float(latents.flatten(1).std(1).mean())
        reach = float(latents.abs().flatten(1).quantile(0.995, 1).mean())
        right = share_right(model, captions, latents)
        print(f"| {_described(rule)} | {right:.1%} | {deviation:.2f} | {reach:.1f} |", flush=True)


def histories(model: HostedModel, count: int, steps: int) -> None:
    """CFG++ with D or Du in a multistep sampler's history."""
    captions = Captions.of(model, count)
    predict = predictor(model, captions)
    grid = model.default_schedule.grid(Trailing(), steps)
    rule = CFGPlusPlus(scale=0.6)
    few = Captions(
        captions.scenes[:COMPARED],
        captions.both.of([*range(COMPARED), *range(count, count + COMPARED)]),
        captions.noise[:COMPARED],
    )
    reference = _flow_of(grid, predictor(model, few), rule.scale, few.noise)
    samplers: Sequence[Sampler] = (DDIM(), DPMSolverPP(), UniPC())
    print("| sampler | history | all right | distance from the flow | latents' deviation |")
    print("|---|---|---|---|---|")
    for sampler in samplers:
        plan = sampler.plan(grid)
        for published in (False, True)[: 1 if plan.slots == 1 else 2]:
            latents = run(plan, predict, rule, captions.noise, published_history=published)
            missed = latents[:COMPARED] - reference
            distance = float(missed.norm() / reference.norm())
            history = "none" if plan.slots == 1 else "Du, published" if published else "D, ours"
            print(
                f"| {sampler.name} | {history} | {share_right(model, captions, latents):.1%} "
                f"| {distance:.3f} | {float(latents.flatten(1).std(1).mean()):.2f} |",
                flush=True,
            )


def inversion(model: HostedModel, count: int, steps: int) -> None:
    """How well pictures that are inverted and drawn again are recovered."""
    captions = Captions.of(model, count)
    predict = predictor(model, captions)
    latents = model.encode_image(render(captions.scenes))
    there = model.decode(latents)
    grid = model.default_schedule.grid(Trailing(), steps)
    plan, rho = DDIM().plan(grid), grid.sigma / grid.alpha
    matched = float(np.median(0.6 / (1 - rho[1:] / rho[:-1])))
    scaled: Sequence[CFGPlusPlus | CFG] = (
        CFGPlusPlus(scale=0.6),
        CFG(scale=1),
        CFG(scale=round(matched, 1)),
        CFG(scale=7.5),
    )
    print("| guided by | corrections | PSNR of the latents | of the pictures | noise's deviation |")
    print("|---|---|---|---|---|")
    for rule, corrections in product(scaled, (0, 2)):
        noise = invert(
            predict, latents, grid, scale=rule.scale, rule=rule.name, corrections=corrections
        )
        back = run(plan, predict, rule, noise)
        print(
            f"| {_described(rule)} | {corrections} | {_psnr(back, latents):.1f} dB "
            f"| {_psnr(model.decode(back).clamp(-1, 1), there.clamp(-1, 1)):.1f} dB "
            f"| {float(noise.flatten(1).std(1).mean()):.3f} |",
            flush=True,
        )


def oscillation(model: HostedModel, count: int, steps: int) -> None:
    """Whether the guidance difference oscillates from step to step.

    The figure is the cosine between each change of the difference and the previous change: 1 if
    changes keep their direction, -1 if they reverse every time.
    """
    captions = Captions.of(model, count)
    predict = predictor(model, captions)
    swinging: Sequence[Rule] = (CFG(scale=4), CFG(scale=7.5), APG(momentum=0), APG())
    samplers: Sequence[Sampler] = (DPMSolverPP(), DDIM())
    print("| sampler | steps | " + " | ".join(_described(rule) for rule in swinging) + " |")
    print("|---" * (2 + len(swinging)) + "|")
    for sampler, count_of_steps in product(samplers, (steps, FINE)):
        plan = sampler.plan(model.default_schedule.grid(Trailing(), count_of_steps))
        found = [_swing(plan, predict, rule, captions.noise) for rule in swinging]
        print(f"| {sampler.name} | {count_of_steps} | {' | '.join(found)} |", flush=True)


def _swing(
    plan: Plan, predict: Callable[[Tensor, float], tuple[Tensor, Tensor]], rule: Rule, x: Tensor
) -> str:
    differences: list[Tensor] = []

    def listen(point: Tensor, t: float) -> tuple[Tensor, Tensor]:
        cond, other = predict(point, t)
        differences.append((cond - other).flatten(1))
        return cond, other

    run(plan, listen, rule, x)
    changes = torch.stack(differences).diff(dim=0)
    cosines = torch.cosine_similarity(changes[1:], changes[:-1], dim=2).mean(0)
    error = float(cosines.std() / len(cosines) ** 0.5)
    return f"{float(cosines.mean()):+.2f} ± {error:.2f}".replace("-", "−")


def _flow_of(
    grid: Grid, predict: Callable[[Tensor, float], tuple[Tensor, Tensor]], scale: float, x: Tensor
) -> Tensor:
    """The limit of CFG++ over this grid as each step is divided into ever more parts.

    The move that CFG++ adds does not depend on the length of a step, so CFG++ is equivalent to CFG
    with a weight for each step, and the flow with these weights is the reference.
    """
    rho = grid.sigma / grid.alpha
    for i in range(grid.steps):
        clean = grid.sigma[i + 1] == 0
        times = np.linspace(grid.t[i], grid.t[i + 1], FINER + 1)
        part = Grid.on_times(grid.schedule, times[:-1] if clean else times, clean=bool(clean))
        weight = CFG(scale=float(scale / (1 - rho[i + 1] / rho[i])))
        x = run(UniPC().plan(part), predict, weight, x)
    return x


def _psnr(found: Tensor, wanted: Tensor) -> float:
    """Mean PSNR over pictures, with each picture's own range as the peak."""
    flat = wanted.flatten(1)
    peak = flat.amax(1) - flat.amin(1)
    error = (found - wanted).square().flatten(1).mean(1)
    return float((10 * torch.log10(peak.square() / error)).mean())


def _described(rule: Rule) -> str:
    plain = type(rule).model_validate({})
    changed = {
        field: value
        for field, value in rule
        if field in {"scale", "scale_high"} or value != getattr(plain, field)
    }
    return f"`{rule.name}` " + ", ".join(
        f"{field} {value:g}" if isinstance(value, float | int) else f"{field} {value}"
        for field, value in changed.items()
        if field != "name"
    )


TABLES = {
    "rules": rules,
    "histories": histories,
    "inversion": inversion,
    "oscillation": oscillation,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m studies.guidance.rules")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument(
        "--captions", type=int, default=100, help="number, half of one object and half of two"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
    with torch.inference_mode():
        TABLES[options.table](model, options.captions, options.steps)


if __name__ == "__main__":
    main()
