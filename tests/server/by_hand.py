"""Images of the toy model: as tasks, and computed by hand, to which engine runs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from guidance import POLICIES, RULES, Edit, NetworkChange, Perturbation, Policy, Rows, Rule
from guidance.always import Always
from guidance.cfg import CFG
from guidance.composed import Composed, WeightedPrompt
from guidance.edits import WeakModel
from guidance.residual import Residual
from samplers import Plan, Sampler, preconditioning
from samplers.dpm_solver_pp import DPMSolverPP
from server.engine.state.noise import stage_noise, start_noise
from server.engine.task import ImageTask
from server.engine.terms.levels import levels_of
from server.engine.terms.registry import terms_of
from server.engine.terms.term import Run, Term
from server.engine.tick.preview import to_uint8
from server.models.hosted import HostedModel
from tests.server.toy_model import SCHEDULE, SIDE, Toy

AND_A_STAR: Rule = Composed(prompts=(WeightedPrompt(prompt="a star"),))

TOGETHER = [
    (rule, policy)
    for rule in (*(kind.model_validate({}) for kind in RULES), AND_A_STAR)
    for policy in (*(kind.model_validate({}) for kind in POLICIES), Residual(mode="onetime"))
    if policy.refuses(rule) is None
]
"""Every rule with every policy that it can be combined with."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked(ImageTask):
    """A task that remembers what its terms were made from."""

    settings: tuple[BaseModel, ...] = ()
    reference: Tensor | None = None

    @property
    def prompt_text(self) -> str:
        """The prompt, which here is never a blend of several."""
        assert isinstance(self.prompt, str)
        return self.prompt


def terms_for(
    settings: Sequence[BaseModel], plan: Plan, model: HostedModel | None = None, **fields: Any
) -> tuple[Term, ...]:
    """Terms of a run of the toy model, as requests make them."""
    hosted = model or Toy()
    given: dict[str, Any] = {"rule": CFG(), "prompt": "a circle", **fields}
    return terms_of(settings, Run(hosted, hosted.default_schedule, plan, **given))


def task(
    rule: Rule | None = None,
    policy: Policy | None = None,
    settings: tuple[BaseModel, ...] = (),
    sampler: Sampler | None = None,
    steps: int = 6,
    reference: Tensor | None = None,
    **fields: Any,
) -> Asked:
    solver = sampler or DPMSolverPP()
    plan = solver.plan(SCHEDULE.grid(solver.default_spacing, steps))
    when = policy or Always()
    combined = rule or CFG()
    branches = max(1, len(combined.branches))
    generator = np.random.default_rng(0)
    given: dict[str, Any] = {"prompt": "a circle", "negative_prompt": "blue", "seed": 3, **fields}
    run = {name: given[name] for name in ("prompt", "negative_prompt")}
    terms = terms_for(settings, plan, rule=combined, reference=reference, **run)
    given.setdefault("terms", terms)
    return Asked(
        model="toy",
        width=SIDE,
        height=SIDE,
        plan=plan,
        rule=combined,
        policy=when,
        settings=settings,
        reference=reference,
        coefficients=generator.normal(size=(plan.evaluations, branches * when.fitted)) / 3,
        **given,
    )


class ByHand:
    """An image computed one row at a time, as the rules, policies and perturbations are written."""

    def __init__(self, model: Toy, task: Asked) -> None:
        self.model, self.task, self.plan = model, task, task.plan
        self.scales = preconditioning("epsilon", task.plan.alpha[:-1], task.plan.sigma[:-1])
        self.times = SCHEDULE.conditioning(task.plan.t[:-1])
        self.ratio = task.plan.sigma[:-1] / task.plan.alpha[:-1]
        self.progress = np.array(task.plan.step) / task.plan.steps
        rule, policy, shape = task.rule, task.policy, model.latent_shape(SIDE, SIDE)
        self.evaluated = policy.evaluates(self.ratio, self.progress)
        self.estimated = policy.estimated(self.ratio, self.progress)
        branches = max(1, len(rule.branches))
        self.constants = policy.constants(task.plan.evaluations, branches, task.coefficients)
        self.rule_memory = torch.zeros(1, rule.memory_slots, *shape)
        self.policy_memory = torch.zeros(1, policy.memory_slots(branches), *shape)
        self.settled = not rule.branches
        self.perturbed = [one for one in task.settings if isinstance(one, Perturbation)]
        self.edits = [one.edit for one in task.settings if isinstance(one, NetworkChange)]
        self.levels = levels_of(task.plan, SCHEDULE)

    def pixels(self) -> NDArray[np.uint8]:
        shape = self.model.latent_shape(SIDE, SIDE)
        state = torch.zeros(self.plan.slots, *shape)
        state[0] = self.start(start_noise(self.task.seed, shape))
        for i in range(self.plan.evaluations):
            denoised, x = self.guided(i, state[:1])
            state[0] = x[0]
            noise = stage_noise(self.task.seed, i, shape)
            columns = torch.cat([state, denoised, noise[None], torch.ones(1, *shape)])
            matrix = torch.tensor(self.plan.tables[i], dtype=torch.float32)
            state = torch.einsum("kj,jchw->kchw", matrix, columns)
        return to_uint8(self.model.decode(state[:1]))[0].numpy()

    def start(self, noise: Tensor) -> Tensor:
        if self.task.image is None:
            return self.plan.start_scale * noise
        [latents] = self.model.encode_image(self.task.image[None])
        return float(self.plan.alpha[0]) * latents + float(self.plan.sigma[0]) * noise

    def denoised(self, i: int, x: Tensor, text: str | None, *edits: Edit) -> Tensor:
        changes = (*self.edits, *edits)
        t = torch.tensor([self.times[i]], dtype=torch.float32)
        points, inputs = float(self.scales.scale_in[i]) * x, self.model.inputs([text])
        if WeakModel() in changes:
            raw = self.model.evaluate_weak(points, t, inputs)
        else:
            scale = getattr(self.task.rule, "scale", 1.0) - 1
            told = torch.tensor([scale]) if self.task.policy.embeds else None
            inputs = replace(inputs, edits=[changes] if changes else (), scale_embedding=told)
            raw = self.model.evaluate(points, t, inputs)
        return float(self.scales.skip[i]) * x + float(self.scales.out[i]) * raw

    def guided(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        cond = self.denoised(i, x, self.task.prompt_text)
        result, moved = cond, x
        if not self.settled and (self.evaluated[i] or self.estimated[i]):
            result, moved = self.combined(i, x, cond)
        for term in self.perturbed:
            if term.evaluates(self.ratio[i : i + 1], self.progress[i : i + 1])[0]:
                strength = float(term.strengths(self.levels)[i])
                away = cond - self.denoised(i, x, self.task.prompt_text, term.edit)
                result = result + strength * away
        return result, moved

    def combined(self, i: int, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        rule, policy, task = self.task.rule, self.task.policy, self.task
        others = [cond] * len(rule.branches)
        if self.evaluated[i]:
            others = [
                self.denoised(i, x, branch.text(task.prompt_text, task.negative_prompt))
                for branch in rule.branches
            ]
        opens = self.plan.step[i] not in self.plan.step[:i]
        closes = self.plan.step[i] not in self.plan.step[i + 1 :]
        levels = self.plan.alpha[i], self.plan.sigma[i], self.progress[i]
        alpha, sigma, progress = (torch.full((1, 1, 1, 1), float(level)) for level in levels)
        first, last = (torch.full((1, 1, 1, 1), flag) for flag in (opens, closes))
        memory = self.rule_memory
        rows = Rows(cond, torch.stack(others, 1), x, alpha, sigma, progress, memory, first, last)
        parameters = policy.parameters([policy], x)
        if policy.adapts:
            self.settled = bool(policy.settled(rows, parameters))
        if policy.estimates:
            numbers = torch.tensor(self.constants[i], dtype=torch.float32).view(1, -1, 1, 1, 1)
            asked = torch.full((1, 1, 1, 1), bool(self.evaluated[i]))
            filled = policy.fill(
                rows, self.policy_memory, {**parameters, "constants": numbers}, asked
            )
            self.policy_memory = filled.memory
            rows = replace(rows, others=filled.others)
        result = rule.combine(rows, rule.parameters([rule], x))
        self.rule_memory = result.memory
        return result.denoised, result.x
