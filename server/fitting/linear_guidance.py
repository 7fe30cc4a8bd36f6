"""Fitting linear adaptive guidance to a hosted model: from runs of full guidance to a file."""

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

__all__ = ["FitOrder", "Runs", "fit", "fulfil"]


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of full guidance that are fitted to.

    Attributes:
        count: how many, each of a prompt and a seed of its own.
        chunk: run at once.
        seed: of the first.
    """

    count: int
    chunk: int = 8
    seed: int = 1_000_000


@dataclass(frozen=True, slots=True)
class FitOrder:
    """What the command line asks for.

    Attributes:
        folder: of the model.
        request: the sampler, spacing, steps and guidance to fit to, with the policy.
        runs: how many runs, and which.
        device: to compute on.
        prompts: file with a prompt a line.
    """

    folder: Path
    request: GenerateRequest
    runs: Runs
    device: str = "auto"
    prompts: Path | None = None


def fulfil(order: FitOrder, tell: Callable[[str, int, int], None]) -> Path:
    """Make a file of coefficients.

    Args:
        order: what is asked for.
        tell: called with what is under way, how far it is, and how far it goes.

    Raises:
        WeftError: the order cannot be fulfilled, with a sentence for the user.
    """
    prompts = prompts_for(order.folder, order.prompts)
    model = load_model(order.folder, name=order.folder.name, device=order.device, dtype="auto")
    resolved = resolve(order.request, model, Limits(), None)
    return store(model, order.folder, resolved, prompts, order.runs, tell)


def store(
    model: HostedModel,
    folder: Path,
    resolved: ResolvedRequest,
    prompts: Sequence[str],
    runs: Runs,
    tell: Callable[[str, int, int], None],
) -> Path:
    """Fit to the sampler, spacing, steps and rule of a request, and write the file.

    Raises:
        InvalidRequest: the policy is not fitted by this, or the rule has no branch.
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
        lambda done: tell("runs", done, runs.count),
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
    tell: Callable[[int], None],
    kept: KeptSums | None = None,
) -> LinearFit:
    """Coefficients of a plan and a rule, branch by branch, by least squares over runs of the model.

    They serve to whatever share of the steps the policy guides.

    Args:
        model: to run.
        plan: of the sampler.
        rule: of the guidance.
        policy: its period says which stages are evaluated.
        prompts: taken in turn; there is no negative prompt.
        runs: how many, and which.
        tell: called with the number of runs that are done.
        kept: where an earlier fit of the same left off.

    Raises:
        InvalidRequest: no runs are asked for.
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
        tell(numbers.stop)
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
    """Denoised predictions of the prompt and the branches in runs of full guidance.

    Returns:
        ``[1 + branches, runs, stages, ...]``.
    """
    facts = model.facts
    shape = model.default_shape
    texts = (branch.text(prompt, None) for branch in rule.branches for prompt in prompts)
    inputs = model.inputs([*prompts, *texts])
    scales = np.stack(preconditioning(facts.prediction, plan.alpha[:-1], plan.sigma[:-1]), 1)
    times = model.told(plan.t[:-1])
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
