"""Guidance of an image over its whole run, as data: what each stage evaluates and estimates.

A stage is one evaluation of the guided prediction. It needs the prompt's prediction and possibly
others, each of them one row of a forward pass.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from server.engine.state.recollection import FIRST_OUTPUT
from server.engine.terms.registry import order_of
from server.engine.terms.term import RowSpec
from server.errors import WeftError, failed_with
from server.models.prompt_editing import EditedPrompt, texts_of_run
from server.plugin_faults import containing_exits
from weft_plugins import FAILURES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from pydantic import BaseModel

    from guidance import Policy
    from samplers import Plan
    from server.engine.task import ImageTask
    from server.engine.terms.term import Term
    from server.models.blend import TextPrompt

Shaped = TypeVar("Shaped", bound=np.generic)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ActiveTerm:
    """A term that acts at a stage.

    Attributes:
        index: index of the term among those of its image.
        kind: class of the term.
        order: rank of its class, and number of terms of that class that act before it.
        rows: positions in ``Ask.numbers`` of the predictions that it wants.
    """

    index: int
    kind: type[Term]
    order: tuple[int, int]
    rows: range


@dataclass(frozen=True, slots=True)
class StagePredictions:
    """Predictions that one stage needs besides the prompt's.

    Predictions of an image are numbered: 0 is the prompt's, then come those of the rule's branches,
    then those that terms want.

    Attributes:
        numbers: numbers of the predictions to evaluate, with those of the branches first.
        evaluated: whether the rule's branches are among them.
        estimated: whether the policy estimates the branches.
        acting: terms that act at the stage.
    """

    numbers: tuple[int, ...]
    evaluated: bool
    estimated: bool
    acting: tuple[ActiveTerm, ...]


@dataclass(frozen=True, slots=True, eq=False)
class GuidancePlan:
    """Guidance of one image, stage by stage.

    Attributes:
        branches: number of branches of the rule at these parameters.
        asks: needs of each stage, until the policy ends guidance.
        settled: needs of each stage after the policy has ended guidance.
        left: rows of the denoiser that the remaining stages cost from each stage on, ending with 0.
            ControlNets count as the rows that would take as long.
        left_settled: the same after guidance has ended.
        widest: maximum number of rows that a stage needs in a forward pass.
        progress: fraction of the steps done before each stage.
        constants: numbers of the policy, ``[stages, n]``.
        predictions: text and edits of each prediction, by number.
        pictured: whether the row of each prediction gets the image prompts. Rows of the rule's
            branches that do not have the prompt get the tokens of no picture instead.
        texts: all texts that the network may be given.
        edited: prompts that change along the run.
        embedded_scale: guidance scale less 1 as given to the network; None if it takes none.
        rule_key: equal for images whose predictions one call can combine.
        policy_slots: number of latent-sized slots that the policy keeps.
        policy_key: equal for images whose branches one call can fill in.
        may_recall: whether the step cache may skip the evaluation of each stage.
        cache_slots: number of latent-sized slots that the step cache keeps.
    """

    branches: int
    asks: list[StagePredictions]
    settled: list[StagePredictions]
    left: list[float]
    left_settled: list[float]
    widest: int
    progress: list[float]
    constants: NDArray[np.float64]
    predictions: tuple[RowSpec, ...]
    pictured: tuple[bool, ...]
    texts: tuple[TextPrompt, ...]
    edited: tuple[EditedPrompt, ...]
    embedded_scale: float | None
    rule_key: tuple[Any, ...]
    policy_slots: int
    policy_key: tuple[Any, ...]
    may_recall: list[bool]
    cache_slots: int


@containing_exits()
def plan_guidance(task: ImageTask) -> GuidancePlan:
    """Lay out the guidance of an image along its sampler's plan.

    Raises:
        ValueError: the policy lacks its coefficients, or cannot serve the rule.
        WeftError: a part fails, or the policy returns values for another number of stages.
    """
    plan, rule, policy = task.plan, task.rule, task.policy
    noise_ratio, progress = plan.noise_ratio, plan.progress
    branches = rule.branches
    if reason := policy.refuses(rule):
        raise ValueError(f"guidance.policy is {policy.name!r}; {reason}.")
    evaluated = _of_stages(policy, plan, lambda: policy.evaluates(noise_ratio, progress))
    evaluated = evaluated & bool(branches)
    estimated = _of_stages(policy, plan, lambda: policy.estimated(noise_ratio, progress))
    estimated = estimated & bool(branches)
    predictions = [RowSpec(task.prompt)]
    for branch in branches:
        text = branch.text(task.prompt, task.negative_prompt)
        predictions.append(RowSpec(text, (branch.edit,) if branch.edit else ()))
    beside = range(1, len(predictions))
    pictured = [True, *(branch.told == "prompt" for branch in branches)]
    wanted = _wanted(task.terms, plan.evaluations, predictions)
    stages = zip(evaluated.tolist(), estimated.tolist(), wanted, strict=True)
    asks = [_ask(beside if known else (), known, guessed, own) for known, guessed, own in stages]
    settled = [_ask((), False, False, own) for own in wanted]
    texts: list[TextPrompt] = [one.text for one in predictions]
    texts += [text for term in task.terms for text in term.texts]
    may_recall, cache_slots = np.zeros(plan.evaluations, np.bool_), 0
    if task.cache is not None:
        may_recall = task.cache.may_recall(noise_ratio, progress)
        cache_slots = FIRST_OUTPUT + len(predictions)
    costs = _costs(task)
    constants, slots = np.zeros((plan.evaluations, 0)), 0
    if branches:
        constants = _of_stages(
            policy,
            plan,
            lambda: policy.constants(plan.evaluations, len(branches), task.coefficients),
        )
        slots = policy.memory_slots(len(branches))
    return GuidancePlan(
        branches=len(branches),
        asks=asks,
        settled=settled,
        left=_left(asks, costs),
        left_settled=_left(settled, costs),
        widest=1 + max(len(ask.numbers) for ask in asks),
        progress=progress.tolist(),
        constants=constants,
        predictions=tuple(predictions),
        pictured=(*pictured, *[True] * (len(predictions) - len(pictured))),
        texts=tuple(dict.fromkeys(chain.from_iterable(map(texts_of_run, texts)))),
        edited=tuple(dict.fromkeys(one for one in texts if isinstance(one, EditedPrompt))),
        embedded_scale=getattr(rule, "scale", 1.0) - 1 if policy.embeds else None,
        rule_key=(type(rule), len(branches), *_kind(rule)),
        policy_slots=slots,
        policy_key=(type(policy), len(branches), slots, constants.shape[1], *_kind(policy)),
        may_recall=may_recall.tolist(),
        cache_slots=cache_slots,
    )


def _of_stages(
    policy: Policy, plan: Plan, answer: Callable[[], NDArray[Shaped]]
) -> NDArray[Shaped]:
    """Values that a policy, which a package may define, gives for each stage.

    Raises:
        ValueError: the policy refuses.
        WeftError: it fails otherwise, or returns values for another number of stages.
    """
    try:
        said = np.asarray(answer())
    except ValueError:
        raise
    except FAILURES as error:
        log.exception("the policy %s failed", policy.name)
        raise WeftError(failed_with(f"The policy {policy.name!r}", error)) from error
    if said.shape[:1] != (plan.evaluations,):
        raise WeftError(
            f"The policy {policy.name!r} gave an array of shape {list(said.shape)}; "
            f"its first axis must be the {plan.evaluations} stages of the run."
        )
    return said


def _wanted(
    terms: Sequence[Term], stages: int, predictions: list[RowSpec]
) -> list[list[tuple[int, Term, tuple[int, ...]]]]:
    """Terms that act at each stage: index, term, and the numbers of its predictions.

    Args:
        terms: terms of an image.
        stages: number of stages of its plan.
        predictions: predictions of the image so far; those of the terms are appended, each once.
    """
    known: dict[tuple[int, int, RowSpec], int] = {}
    wanted: list[list[tuple[int, Term, tuple[int, ...]]]] = []
    for stage in range(stages):
        acting = [(k, term) for k, term in enumerate(terms) if term.acts(stage)]
        wanted.append([])
        for k, term in acting:
            keys = [(k, place, row) for place, row in enumerate(term.rows(stage))]
            for key in keys:
                if key not in known:
                    known[key] = len(predictions)
                    predictions.append(key[2])
            wanted[-1].append((k, term, tuple(known[key] for key in keys)))
    return wanted


def _ask(
    branches: Sequence[int],
    evaluated: bool,
    estimated: bool,
    terms: Sequence[tuple[int, Term, tuple[int, ...]]],
) -> StagePredictions:
    numbers, acting, seen = [*branches], list[ActiveTerm](), Counter["type[Term]"]()
    for index, term, own in terms:
        kind = type(term)
        rows = range(len(numbers), len(numbers) + len(own))
        acting.append(ActiveTerm(index, kind, (order_of(kind), seen[kind]), rows))
        numbers += own
        seen[kind] += 1
    return StagePredictions(tuple(numbers), evaluated, estimated, tuple(acting))


def _costs(task: ImageTask) -> list[float]:
    """Cost of a row at each stage, in rows of the denoiser: more where ControlNets act."""
    stages = task.plan.evaluations
    return [
        1 + sum(use.control.cost for use in task.controls if use.acts(stage, stages))
        for stage in range(stages)
    ]


def _left(asks: Sequence[StagePredictions], costs: Sequence[float]) -> list[float]:
    stages = zip(reversed(asks), reversed(costs), strict=True)
    rows = (cost * (1 + len(ask.numbers)) for ask, cost in stages)
    return list(accumulate(rows, initial=0.0))[::-1]


def _kind(setting: BaseModel) -> tuple[Any, ...]:
    """Properties of a setting that tensors over rows cannot hold: names, flags, lengths."""
    return tuple(
        len(value) if isinstance(value, tuple) else value
        for _, value in setting
        if isinstance(value, str | bool | tuple)
    )
