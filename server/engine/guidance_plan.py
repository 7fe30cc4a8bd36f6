"""An image's guidance over its whole run, as data: what each stage evaluates and estimates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from pydantic import BaseModel

    from guidance.edits import Edit
    from server.engine.task import ImageTask


@dataclass(frozen=True, slots=True)
class Ask:
    """What one stage needs beside the prompt's prediction.

    Predictions of an image are numbered: 0 the prompt's, then those of the rule's branches, then
    the perturbed ones, then the picture that the image avoids, then the reference that the
    classifier chooses.

    Attributes:
        numbers: of the predictions to evaluate.
        evaluated: whether the rule's branches are among them.
        estimated: whether the policy estimates the branch.
        perturbed: number and scale of each perturbed prediction among them.
        avoided: number of the avoided picture's prediction, 0 where it is not among them.
        push: how far the prediction moves for each unit of the classifier's gradient.
        reference: scale of the term that leads away from the reference, which is the last of
            ``numbers`` unless this is 0.
    """

    numbers: tuple[int, ...]
    evaluated: bool
    estimated: bool
    perturbed: tuple[tuple[int, float], ...]
    avoided: int = 0
    push: float = 0.0
    reference: float = 0.0

    @property
    def aimed(self) -> bool:
        """Whether the classifier is asked."""
        return bool(self.push or self.reference)


@dataclass(frozen=True, slots=True, eq=False)
class GuidancePlan:
    """Guidance of one image, stage by stage.

    Attributes:
        branches: how many the rule has at these parameters.
        asks: of each stage, while guidance goes on.
        settled: of each stage, once the policy has ended it.
        left: evaluations from each stage on, and 0 at the end.
        left_settled: the same once guidance has ended.
        widest: most rows of a forward that a stage needs.
        progress: share of the steps done before each stage.
        apart: at which stages the images of its group keep apart.
        constants: the policy's numbers, ``[stages, n]``.
        edits: what each prediction changes inside the network, by number.
        edited: whether any does.
        told_scale: guidance scale less 1 that the network is told; None where it is told none.
        rule_key: equal for images whose predictions one call can combine.
        policy_key: equal for images whose second prediction one call can fill in.
    """

    branches: int
    asks: list[Ask]
    settled: list[Ask]
    left: list[int]
    left_settled: list[int]
    widest: int
    progress: list[float]
    apart: list[bool]
    constants: NDArray[np.float64]
    edits: list[tuple[Edit, ...]]
    edited: bool
    told_scale: float | None
    rule_key: tuple[Any, ...]
    policy_key: tuple[Any, ...]


def plan_guidance(task: ImageTask) -> GuidancePlan:
    """Lay out the guidance of an image along its sampler's plan.

    Raises:
        ValueError: the policy lacks its coefficients, or cannot estimate so many branches.
    """
    plan, rule, policy = task.plan, task.rule, task.policy
    noise_ratio, progress = plan.noise_ratio, plan.progress
    branches = rule.branches
    if policy.estimates and len(branches) > 1:
        raise ValueError(f"{policy.name} estimates one branch, and {rule.name} has {len(branches)}")
    evaluated = policy.evaluates(noise_ratio, progress) & bool(branches)
    estimated = policy.estimated(noise_ratio, progress) & bool(branches)
    first = 1 + len(branches)
    perturbed = _perturbed(task, first)
    avoided = first + len(task.perturbed)
    shown = np.zeros(plan.evaluations, np.int64)
    if task.avoided is not None:
        shown[task.avoided.negtome.contains(noise_ratio, progress)] = avoided
    apart = np.zeros(plan.evaluations, np.bool_)
    if task.group is not None and task.group.apart is not None:
        apart = task.group.apart.contains(noise_ratio, progress)
    terms = [*zip(perturbed, shown.tolist(), *_classified(task), strict=True)]
    stages = zip(evaluated.tolist(), estimated.tolist(), terms, strict=True)
    numbers = range(1, first), avoided + 1
    asks = [_ask(*numbers, known, guessed, *own) for known, guessed, own in stages]
    settled = [_ask(*numbers, False, False, *own) for own in terms]
    edits = [
        (),
        *((branch.edit,) if branch.edit else () for branch in branches),
        *((perturbation.edit,) for perturbation in task.perturbed),
        (),
        (),
    ]
    constants = np.zeros((plan.evaluations, 0))
    if branches:
        constants = policy.constants(plan.evaluations, task.coefficients)
    return GuidancePlan(
        branches=len(branches),
        asks=asks,
        settled=settled,
        left=_left(asks),
        left_settled=_left(settled),
        widest=1 + max(len(ask.numbers) for ask in asks),
        progress=progress.tolist(),
        apart=apart.tolist(),
        constants=constants,
        edits=[task.edits + own for own in edits],
        edited=bool(task.edits) or any(edits),
        told_scale=getattr(rule, "scale", 1.0) - 1 if policy.embeds else None,
        rule_key=(type(rule), len(branches), *_kind(rule)),
        policy_key=(type(policy), policy.memory_slots, constants.shape[1], *_kind(policy)),
    )


def _perturbed(task: ImageTask, first: int) -> list[tuple[tuple[int, float], ...]]:
    """Numbers, from the first on, and strengths of the disturbed predictions of each stage."""
    plan = task.plan
    strengths = [p.scale for p in task.perturbed] if task.strengths is None else task.strengths
    acting = [
        p.evaluates(plan.noise_ratio, plan.progress) * strength
        for p, strength in zip(task.perturbed, strengths, strict=True)
    ]
    stages: list[tuple[float, ...]] = [*zip(*acting, strict=True)] or [()] * plan.evaluations
    return [
        tuple((first + k, float(strength)) for k, strength in enumerate(stage) if strength)
        for stage in stages
    ]


def _classified(task: ImageTask) -> tuple[list[float], list[float]]:
    """How strongly the classifier's gradient, and its reference, act at each stage."""
    nothing = [0.0] * task.plan.evaluations
    if task.aim is None:
        return nothing, nothing
    strengths = task.aim.strengths.tolist()
    return (nothing, strengths) if task.aim.alternatives else (strengths, nothing)


def _ask(
    branches: range,
    number: int,
    evaluated: bool,
    estimated: bool,
    perturbed: tuple[tuple[int, float], ...],
    avoided: int,
    push: float,
    reference: float,
) -> Ask:
    numbers = (
        *(branches if evaluated else ()),
        *(disturbed for disturbed, _ in perturbed),
        *((avoided,) if avoided else ()),
        *((number,) if reference else ()),
    )
    return Ask(numbers, evaluated, estimated, perturbed, avoided, push, reference)


def _left(asks: Sequence[Ask]) -> list[int]:
    rows = (1 + len(ask.numbers) for ask in reversed(asks))
    return list(accumulate(rows, initial=0))[::-1]


def _kind(setting: BaseModel) -> tuple[Any, ...]:
    """What of a setting no tensor over several rows can hold: names, flags, lengths."""
    return tuple(
        len(value) if isinstance(value, tuple) else value
        for _, value in setting
        if isinstance(value, str | bool | tuple)
    )
