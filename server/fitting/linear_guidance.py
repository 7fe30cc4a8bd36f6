"""Fitting of linear adaptive guidance to a hosted model, from fully guided runs to a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidance import POLICIES, Policy, Rule
from guidance.linear_fit import FitIdentity, LinearFit, moments, residual, solve
from guidance.loop import guide
from guidance.policy import steps_of
from samplers import Plan, integrate, preconditioning
from server.engine.state.noise import stage_noise, start_noise
from server.errors import InvalidRequest
from server.fitting.kept_sums import KeptSums
from server.fitting.samples import prompts_for
from server.models.hosted import HostedModel
from server.models.linear_fits import PREFIX, fit_file, identity_of
from server.models.loading import load_model
from server.requests.choice import listed, name_of
from server.requests.resolve import make_plan, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest, split
from server.settings import Limits

__all__ = ["FitOrder", "Runs", "fit", "run_order"]


@dataclass(frozen=True, slots=True)
class Runs:
    """The fully guided runs to fit to.

    Attributes:
        count: number of runs, each with its own prompt and seed.
        chunk: number of runs in one batch.
        seed: seed of the first run.
    """

    count: int
    chunk: int = 8
    seed: int = 1_000_000


@dataclass(frozen=True, slots=True)
class FitOrder:
    """An order from the command line.

    Attributes:
        folder: folder of the model.
        request: sampler, spacing, steps and guidance to fit to, with the policy.
        runs: number and choice of the runs.
        device: device to compute on.
        prompts: file with one prompt per line.
    """

    folder: Path
    request: GenerateRequest
    runs: Runs
    device: str = "auto"
    prompts: Path | None = None


def run_order(order: FitOrder, on_progress: Callable[[str, int, int], None]) -> Path:
    """Fit coefficients and write them to a file.

    Args:
        order: order from the command line.
        on_progress: callback for progress, called with the name of the stage, the number done, and
            the total.

    Raises:
        WeftError: the order cannot be fulfilled, with a sentence for the user.
    """
    prompts = prompts_for(order.folder, order.prompts)
    model = load_model(order.folder, name=order.folder.name, device=order.device, dtype="auto")
    resolved = resolve(order.request, model, Limits(), None)
    return store(model, order.folder, resolved, prompts, order.runs, on_progress)


def store(
    model: HostedModel,
    folder: Path,
    resolved: ResolvedRequest,
    prompts: Sequence[str],
    runs: Runs,
    on_progress: Callable[[str, int, int], None],
) -> Path:
    """Fit to the sampler, spacing, steps and rule of a request, and write the file.

    Raises:
        InvalidRequest: the policy is not fitted by this command, or the rule has no branch.
    """
    rule, policy = split(resolved.guidance)
    if policy.fitted_by != PREFIX:
        fitted = [name_of(kind) for kind in POLICIES if kind.fitted_by == PREFIX]
        raise InvalidRequest(
            "guidance.policy",
            f"guidance.policy is {policy.name!r}; `weft {PREFIX}` fits {listed(fitted)}.",
        )
    if not rule.branches:
        raise InvalidRequest(
            "guidance",
            f"guidance is {rule.name!r}, which does nothing at these parameters; there is no "
            "second prediction to fit.",
        )
    layout = resolved.sampler, resolved.spacing, resolved.steps
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    plan = make_plan(schedule, *layout, None)
    identity = identity_of(model.facts.denoiser, plan, rule, policy.fit_period)
    file = fit_file(folder, resolved.sampler.name, resolved.steps, identity)
    kept = KeptSums(file.with_suffix(".sums"), _description(identity, prompts, runs.seed))
    made = fit(
        model,
        plan,
        rule,
        policy,
        prompts,
        runs,
        lambda done: on_progress("runs", done, runs.count),
        kept,
    )
    made.save(file)
    kept.drop()
    return file


def _description(identity: FitIdentity, prompts: Sequence[str], seed: int) -> str:
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return json.dumps([asdict(identity), digest, seed])


def fit(
    model: HostedModel,
    plan: Plan,
    rule: Rule,
    policy: Policy,
    prompts: Sequence[str],
    runs: Runs,
    on_progress: Callable[[int], None],
    kept: KeptSums | None = None,
) -> LinearFit:
    """Fit coefficients of a plan and a rule by least squares over runs, branch by branch.

    They are valid for any share of the steps that the policy guides.

    Args:
        model: model to run.
        plan: plan of the sampler.
        rule: guidance rule.
        policy: policy whose period determines which stages are evaluated.
        prompts: prompts, taken in turn; there is no negative prompt.
        runs: number and choice of the runs.
        on_progress: callback, called with the number of runs that are done.
        kept: sums of an earlier, interrupted fit of the same.

    Raises:
        InvalidRequest: no runs are requested.
    """
    kept = kept or KeptSums(None, "")
    evaluated = steps_of(np.array(plan.step)) % policy.fit_period == 0
    done, sums = kept.read(runs.count)
    for first in range(done, runs.count, runs.chunk):
        numbers = range(first, min(first + runs.chunk, runs.count))
        chosen = [prompts[k % len(prompts)] for k in numbers]
        cond, *others = _run(model, plan, rule, chosen, [runs.seed + k for k in numbers])
        part = np.stack([moments(cond, other, evaluated) for other in others])
        sums = part if sums is None else sums + part
        kept.keep(numbers.stop, sums)
        on_progress(numbers.stop)
    if sums is None:
        raise InvalidRequest("runs", "runs is 0; at least 1 is needed.")
    coefficients = [solve(branch) for branch in sums]
    errors = [residual(*fitted) for fitted in zip(sums, coefficients, strict=True)]
    identity = identity_of(model.facts.denoiser, plan, rule, policy.fit_period)
    return LinearFit(
        np.concatenate(coefficients, 1), identity, runs.count, np.max(np.stack(errors), 0)
    )


@torch.no_grad()
def _run(
    model: HostedModel, plan: Plan, rule: Rule, prompts: Sequence[str], seeds: Sequence[int]
) -> NDArray[np.float64]:
    """Denoised predictions of the prompt and the branches in fully guided runs.

    Returns:
        ``[1 + branches, runs, stages, ...]``.
    """
    facts = model.facts
    shape = model.default_shape
    texts = (branch.text(prompt, None) for branch in rule.branches for prompt in prompts)
    inputs = model.inputs([*prompts, *texts])
    scales = np.stack(preconditioning(facts.prediction, plan.alpha[:-1], plan.sigma[:-1]), 1)
    times = model.network_time(plan.t[:-1])
    predictions: list[Tensor] = []
    memory: Tensor | None = None

    def denoise(x: Tensor, _: float) -> Tensor:
        nonlocal memory
        stage = len(predictions)
        scale_in, skip, out = scales[stage].tolist()
        rows = x.repeat(1 + len(rule.branches), *[1] * (x.ndim - 1))
        t = x.new_full((len(rows),), float(times[stage]))
        rows = skip * rows + out * model.evaluate(scale_in * rows, t, inputs)
        cond, *others = rows.chunk(1 + len(rule.branches))
        predictions.append(torch.stack([cond, *others]))
        guided = guide(
            rule,
            cond,
            others,
            x,
            float(plan.alpha[stage]),
            float(plan.sigma[stage]),
            progress=plan.step[stage] / plan.steps,
            memory=memory,
            opens_step=plan.opens_step(stage),
            closes_step=plan.closes_step(stage),
        )
        memory = guided.memory
        x.copy_(guided.x)
        return guided.denoised

    integrate(
        plan,
        denoise,
        plan.start_scale
        * torch.stack([start_noise(seed, shape) for seed in seeds]).to(model.device),
        lambda stage: torch.stack([stage_noise(seed, stage, shape) for seed in seeds]),
    )
    return torch.stack(predictions, 2).cpu().double().numpy()
