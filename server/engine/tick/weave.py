"""Weaving of a tick's rows: pack, evaluate in one forward pass, guide, advance, write back.

The rows of a batch are the predictions that its images need at their current stages: first one
of each image's prompt, in the order of the images, then the others.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from guidance import Filled, Guided, Rows
from samplers import advance
from server.engine.state.batch import Batch, StackedTerms
from server.engine.state.noise import stage_noise
from server.engine.state.padding import padded
from server.engine.tick.answers import answering, expect, expect_flags
from server.engine.tick.forward import forward, forward_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Sequence as Listed
    from contextlib import AbstractContextManager

    from torch import Tensor

    from server.engine.state.compiled import CompiledPlan
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import Sequence
    from server.engine.terms.term import Term

Key = TypeVar("Key")


class NewMemory(NamedTuple):
    """New memory ``[positions, slots, C, h, w]`` of some images."""

    positions: list[int]
    memory: Tensor


class Evaluated(NamedTuple):
    """The predictions of all rows of a batch, each ``[rows, C, h, w]``.

    Attributes:
        x: noisy latents at which they were made.
        denoised: denoised predictions.
    """

    x: Tensor
    denoised: Tensor


class Scales(NamedTuple):
    """Scalars at the current stage of each row of a batch, float32 ``[rows]``.

    Attributes:
        t: noise level as given to the network.
        scale_in: factor of x in the network's input.
        skip: factor of x in the prediction.
        out: factor of the network's output in the prediction.
    """

    t: Tensor
    scale_in: Tensor
    skip: Tensor
    out: Tensor

    def points(self, x: Tensor) -> Tensor:
        """The network's input at x ``[rows, C, h, w]``."""
        return _as_factor(self.scale_in, x) * x

    def denoised(self, x: Tensor, raw: Tensor) -> Tensor:
        """Denoised predictions at x from the network's raw output, ``[rows, C, h, w]``."""
        return _as_factor(self.skip, x) * x + _as_factor(self.out, x) * raw


@dataclass(frozen=True, slots=True, eq=False)
class GuidedImages:
    """Guided predictions ``[images, C, h, w]``, and the new state of the guidance.

    Attributes:
        denoised: guided predictions to step with.
        x: latents to step from; None if no rule has moved them.
        rule_memory: new memory of images whose rule keeps any.
        policy_memory: new memory of images whose policy keeps any.
        settled: whether each image's guidance ends here, bool ``[images]``; None if none can.
    """

    denoised: Tensor
    x: Tensor | None
    rule_memory: list[NewMemory]
    policy_memory: list[NewMemory]
    settled: Tensor | None


def pack(lane: Lane, sequences: list[Sequence]) -> Batch:
    """Gather the states of the chosen images, and lay out the rows of their forward pass."""
    owners = list(range(len(sequences)))
    numbers = [0] * len(sequences)
    firsts: list[int] = []
    others: dict[int, list[int]] = {}
    terms: dict[tuple[tuple[int, int], type[Term]], StackedTerms] = {}
    for i, sequence in enumerate(sequences):
        ask, first = sequence.ask, len(owners)
        firsts.append(first)
        owners += [i] * len(ask.numbers)
        numbers += ask.numbers
        if ask.evaluated:
            others[i] = list(range(first, first + sequence.guidance.branches))
        for acting in ask.acting:
            key = acting.order, acting.kind
            terms.setdefault(key, StackedTerms(acting.kind)).add(i, sequence, acting, first)
    rows = lane.indices([sequence.slot for sequence in sequences])
    return Batch(
        lane=lane,
        sequences=sequences,
        plans=[_compiled(lane, sequence) for sequence in sequences],
        columns=lane.pool.columns.index_select(0, rows),
        owners=owners,
        numbers=numbers,
        firsts=firsts,
        others=others,
        terms=[terms[key] for key in sorted(terms, key=itemgetter(0))],
    )


def _compiled(lane: Lane, sequence: Sequence) -> CompiledPlan:
    """The image's compiled plan, looked up again only if the pool's states have grown deeper."""
    made = sequence.compiled
    if made is None or made.slots != lane.pool.slots:
        made = sequence.compiled = lane.compiled(sequence.task.plan)
    return made


def evaluate(
    batches: Listed[Batch], watch: AbstractContextManager[object] | None = None
) -> list[Evaluated]:
    """Run one forward pass for all rows, and another for rows that ask for the weaker companion.

    Args:
        batches: one batch per size; more than one only for a model that mixes sizes.
        watch: context that is entered while the network runs.
    """
    parts = forward_rows(batches)
    for batch, rows in zip(batches, parts, strict=True):
        for stacked in batch.terms:
            if stacked.kind.prepares:
                seen = batch.term_context(stacked, padded=False)
                stacked.kind.prepare(stacked.terms, rows, batch.rows_of(stacked), seen)
                stacked.states = seen.states
    scales = [scales_of(batch) for batch in batches]
    points = [own.points(rows.x) for own, rows in zip(scales, parts, strict=True)]
    raw = forward(batches, parts, points, [own.t for own in scales], watch or nullcontext())
    return [
        Evaluated(rows.x, own.denoised(rows.x, made))
        for own, rows, made in zip(scales, parts, raw, strict=True)
    ]


def scales_of(batch: Batch) -> Scales:
    """Scalars that relate the rows of a batch to inputs and outputs of the network."""
    scalars = _columns_of(
        batch,
        batch.owners,
        lambda plan, i: (plan.t[i], plan.scale_in[i], plan.skip[i], plan.out[i]),
    )
    return Scales(*scalars.unbind(1))


def guide(batch: Batch, predictions: Tensor) -> GuidedImages:
    """Combine the predictions, calling each rule once for all of its rows.

    Args:
        batch: images of one lane.
        predictions: denoised predictions of all rows of the forward pass, ``[rows, C, h, w]``.
    """
    denoised, x = predictions[: len(batch.sequences)], None
    predictions, others, policy_memory = _filled(batch, predictions)
    rule_memory: list[NewMemory] = []
    by_rule = _grouped(others, lambda i: batch.sequences[i].guidance.rule_key)
    for members in by_rule.values():
        rules = [batch.sequences[i].task.rule for i in members]
        slots = rules[0].memory_slots
        rows = _stacked(batch, members, predictions, others, slots)
        with answering(rules[0], rows.x.device):
            parameters = rules[0].parameters(rules, rows.x[:1])
            rows, parameters = _fixed(rows, parameters, batch.fixed_rows)
            guided = rules[0].combine(rows, parameters)
            expect(guided, Guided, rows.cond, rows.x, rows.memory)
        denoised = _with(batch, denoised, members, guided.denoised)
        if guided.x is not rows.x:
            x = _with(batch, batch.columns[:, 0] if x is None else x, members, guided.x)
        if slots:
            rule_memory.append(NewMemory(members, guided.memory[: len(members)]))
    for stacked in batch.terms:
        if stacked.kind.applies:
            denoised = _apply(batch, stacked, predictions, denoised)
    return GuidedImages(denoised, x, rule_memory, policy_memory, _settled(batch, predictions))


def step(batch: Batch, guidance: GuidedImages) -> Tensor:
    """Advance every image by its stage, in one batched operation per shape of tables.

    Tables have three shapes: scalar, per channel, and elementwise.

    Returns:
        New states ``[images, K, C, h, w]``.
    """
    columns, K = batch.columns, batch.lane.pool.slots
    if guidance.x is not None:
        columns[:, 0] = guidance.x
    columns[:, K] = guidance.denoised
    noisy = [i for i, plan in enumerate(batch.plans) if plan.noisy[batch.sequences[i].stage]]
    if noisy:
        where = batch.lane.indices(noisy)
        columns[:, K + 1].index_copy_(0, where, _fresh_noise(batch, noisy))
    state = columns[:, :K]
    by_shape = _grouped(range(len(batch.plans)), lambda i: batch.plans[i].detail)
    for members in by_shape.values():
        tables = torch.stack([batch.plans[i].table(batch.sequences[i].stage) for i in members])
        langevin = _langevin(batch, members)
        moved = advance(
            padded(_of(batch, columns, members), batch.fixed_rows),
            padded(tables, batch.fixed_rows),
            None if langevin is None else padded(langevin, batch.fixed_rows),
        )
        state = _with(batch, state, members, moved)
    _keep_known(batch, state)
    return state


def write_back(batch: Batch, state: Tensor, guidance: GuidedImages) -> None:
    """Write new states and memories to the pool: the only write, after all else has succeeded."""
    pool = batch.lane.pool
    rows = _slots(batch, range(len(batch.sequences)))
    pool.columns[:, : pool.slots].index_copy_(0, rows, state)
    for memory, all_kept in (
        (pool.rule_memory, guidance.rule_memory),
        (pool.policy_memory, guidance.policy_memory),
    ):
        for kept in all_kept:
            slots = kept.memory.shape[1]
            memory[:, :slots].index_copy_(0, _slots(batch, kept.positions), kept.memory)
    for stacked in batch.terms:
        for i, index, own in zip(stacked.positions, stacked.indices, stacked.states, strict=True):
            batch.sequences[i].term_states[index] = own


def _apply(batch: Batch, stacked: StackedTerms, predictions: Tensor, denoised: Tensor) -> Tensor:
    """Apply the terms of one class to the guided predictions ``[images, C, h, w]``."""
    seen = batch.term_context(stacked, padded=True)
    guided = denoised.index_select(0, batch.lane.indices(seen.positions))
    predicted = batch.predicted_for(stacked, predictions)
    moved = stacked.kind.apply(batch.filled(stacked.terms), guided, predicted, seen)
    stacked.states = seen.states[: len(stacked.positions)]
    return _with(batch, denoised, stacked.positions, moved)


def _filled(
    batch: Batch, predictions: Tensor
) -> tuple[Tensor, Mapping[int, list[int]], list[NewMemory]]:
    """Append the predictions that policies fill in; also return each image's rows in order."""
    estimating = [
        i
        for i, sequence in enumerate(batch.sequences)
        if sequence.task.policy.estimates and (sequence.ask.estimated or sequence.ask.evaluated)
    ]
    if not estimating:
        return predictions, batch.others, []
    others, new, kept = dict(batch.others), [predictions], list[NewMemory]()
    count = len(predictions)
    by_policy = _grouped(estimating, lambda i: batch.sequences[i].guidance.policy_key)
    for members in by_policy.values():
        sequences = [batch.sequences[i] for i in members]
        policy, guidance = sequences[0].task.policy, sequences[0].guidance
        branches, slots = guidance.branches, guidance.policy_slots
        # If nothing was evaluated, the prompt's own prediction is a placeholder, which is finite.
        known = {i: others.get(i, [i] * branches) for i in members}
        rows = _stacked(batch, members, predictions, known, 0)
        memory = batch.lane.pool.policy_memory[:, :slots].index_select(0, _slots(batch, members))
        constants = [sequence.guidance.constants[sequence.stage] for sequence in sequences]
        evaluated = _on_device(batch.lane, [s.ask.evaluated for s in sequences]) > 0
        evaluated = padded(_as_factor(evaluated, rows.x), batch.fixed_rows)
        memory = padded(memory, batch.fixed_rows)
        with answering(policy, rows.x.device):
            parameters = {
                **policy.parameters([sequence.task.policy for sequence in sequences], rows.x[:1]),
                "constants": _as_factors(_on_device(batch.lane, np.stack(constants)), rows.x),
            }
            fixed, parameters = _fixed(rows, parameters, batch.fixed_rows)
            filled = policy.fill(fixed, memory, parameters, evaluated)
            expect(filled, Filled, fixed.others, memory)
        new.append(filled.others[: len(members)].flatten(0, 1))
        kept.append(NewMemory(members, filled.memory[: len(members)]))
        for i in members:
            others[i] = list(range(count, count + branches))
            count += branches
    return torch.cat(new), dict(sorted(others.items())), kept


def _settled(batch: Batch, predictions: Tensor) -> Tensor | None:
    """Whether each image ends its guidance here, bool ``[images]``; None if none can."""
    adapting = [i for i in batch.others if batch.sequences[i].task.policy.adapts]
    if not adapting:
        return None
    settled = torch.zeros(len(batch.sequences), dtype=torch.bool, device=predictions.device)
    by_policy = _grouped(adapting, lambda i: batch.sequences[i].guidance.policy_key)
    for members in by_policy.values():
        policies = [batch.sequences[i].task.policy for i in members]
        rows = _stacked(batch, members, predictions, batch.others, 0)
        with answering(policies[0], rows.x.device):
            parameters = policies[0].parameters(policies, rows.x[:1])
            fixed, parameters = _fixed(rows, parameters, batch.fixed_rows)
            answer = policies[0].settled(fixed, parameters)
            expect_flags(answer, "settled", len(fixed.x))
        settled.index_copy_(0, batch.lane.indices(members), answer[: len(members)])
    return settled


def _fresh_noise(batch: Batch, members: list[int]) -> Tensor:
    """Noise of the stages of some images, ``[members, C, h, w]``, on the device."""
    device, sequences = batch.lane.model.device, [batch.sequences[i] for i in members]
    drawn = torch.stack([stage_noise(s.task.seed, s.stage, batch.lane.shape) for s in sequences])
    if device.type == "cuda":
        # Without pinning, the copy would begin only after the forward pass has finished.
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def _langevin(batch: Batch, members: list[int]) -> Tensor | None:
    """Scalars for the nonlinear stages among these, ``[members, 3]``; None if all are linear."""
    if not any(batch.plans[i].langevin[batch.sequences[i].stage] for i in members):
        return None
    return _columns_of(
        batch, members, lambda plan, i: (plan.langevin[i], plan.alpha[i], plan.sigma[i])
    )


def _keep_known(batch: Batch, state: Tensor) -> None:
    """Inpainting: in the kept area, set x to the known picture at the new noise level."""
    for i, (sequence, plan) in enumerate(zip(batch.sequences, batch.plans, strict=True)):
        known = sequence.known
        if known is not None:
            reached = sequence.stage + 1
            level = plan.alpha[reached] * known.latents + plan.sigma[reached] * known.noise
            state[i, 0] = torch.lerp(level, state[i, 0], known.repaint)


def _stacked(
    batch: Batch,
    members: list[int],
    predictions: Tensor,
    others: Mapping[int, list[int]],
    memory_slots: int,
) -> Rows:
    """Stack the predictions and levels of some images, whose positions ascend."""
    x = _of(batch, batch.columns[:, 0], members)
    cond = _of(batch, predictions[: len(batch.sequences)], members)
    scalars: list[tuple[float, ...]] = []
    for i in members:
        sequence, plan = batch.sequences[i], batch.plans[i]
        stage, progress = sequence.stage, sequence.guidance.progress
        scalars.append(
            (
                plan.alpha[stage],
                plan.sigma[stage],
                progress[stage],
                sequence.opens_step,
                sequence.closes_step,
            )
        )
    columns = _as_factors(_on_device(batch.lane, scalars), x)
    alpha, sigma, progress = columns[:, :3].unbind(1)
    opens, closes = (columns[:, 3:] > 0).unbind(1)
    rows = batch.lane.indices([row for i in members for row in others[i]])
    memory = batch.lane.pool.rule_memory[:, :memory_slots]
    return Rows(
        cond=cond,
        others=predictions.index_select(0, rows).view(len(members), -1, *x.shape[1:]),
        x=x,
        alpha=alpha,
        sigma=sigma,
        progress=progress,
        memory=memory.index_select(0, _slots(batch, members)),
        opens_step=opens,
        closes_step=closes,
    )


def _fixed(
    rows: Rows, parameters: Mapping[str, Tensor], fixed_rows: int | None
) -> tuple[Rows, dict[str, Tensor]]:
    if fixed_rows is None:
        return rows, dict(parameters)
    fixed = {name: padded(getattr(rows, name), fixed_rows) for name in Rows.__slots__}
    return Rows(**fixed), {k: padded(v, fixed_rows) for k, v in parameters.items()}


def _columns_of(
    batch: Batch, positions: list[int], of: Callable[[CompiledPlan, int], tuple[float, ...]]
) -> Tensor:
    """Scalars of the current stage of each position, float32 ``[positions, scalars]``."""
    return _on_device(batch.lane, [of(batch.plans[i], batch.sequences[i].stage) for i in positions])


def _on_device(lane: Lane, values: Any) -> Tensor:
    """Numbers as float32 on the device; creating them there would wait for the device."""
    return torch.tensor(values, dtype=torch.float32).to(lane.model.device, non_blocking=True)


def _as_factor(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.view(-1, *[1] * (like.ndim - 1))


def _as_factors(scalars: Tensor, like: Tensor) -> Tensor:
    """``[rows, n]`` as ``[rows, n, 1, 1, 1]``."""
    return scalars.view(*scalars.shape, *[1] * (like.ndim - 1))


def _of(batch: Batch, rows: Tensor, members: list[int]) -> Tensor:
    """Entries of ``[images, ...]`` of some images, whose positions ascend."""
    if len(members) == len(rows):
        return rows
    return rows.index_select(0, batch.lane.indices(members))


def _with(batch: Batch, rows: Tensor, members: list[int], new: Tensor) -> Tensor:
    """Replace the entries of some images, whose positions ascend; ``new`` may be padded."""
    new = new[: len(members)]
    if len(members) == len(rows):
        return new
    return rows.index_copy(0, batch.lane.indices(members), new)


def _slots(batch: Batch, positions: Iterable[int]) -> Tensor:
    """Rows of the pool that belong to the images at these positions."""
    return batch.lane.indices([batch.sequences[i].slot for i in positions])


def _grouped(positions: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    groups: dict[Key, list[int]] = {}
    for i in positions:
        groups.setdefault(key(i), []).append(i)
    return groups
