"""One tick's rows: packed, evaluated in one forward, guided, advanced, written back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from guidance import Rows, stack
from samplers import advance
from server.engine.noise import stage_noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from server.engine.compiled import CompiledPlan
    from server.engine.lane import Lane
    from server.engine.sequence import ImageTask, Sequence

Key = TypeVar("Key")


@dataclass(slots=True, eq=False)
class Batch:
    """The images of one tick and their tensors.

    Attributes:
        lane: of all of them.
        sequences: the images, one a row of the state.
        plans: their compiled plans.
        columns: a copy of their states, ``[images, K + 2, C, h, w]``.
        paired: which images evaluate the second branch, as positions.
        fixed_rows: where set, every operation that could depend on the batch size runs at this
            many rows, so that a row's bits do not depend on its company.
    """

    lane: Lane
    sequences: list[Sequence]
    plans: list[CompiledPlan]
    columns: Tensor
    paired: list[int]
    fixed_rows: int | None

    @property
    def rows(self) -> int:
        """Rows of the forward, padding not counted."""
        return len(self.sequences) + len(self.paired)


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """Guided predictions ``[images, C, h, w]``, and what the guidance leaves behind.

    Attributes:
        denoised: to step with.
        x: to step from.
        memory: new memory of the images whose rule keeps any, by position.
        settled: which images end their guidance here, bool ``[images]``.
    """

    denoised: Tensor
    x: Tensor
    memory: dict[int, Tensor]
    settled: Tensor


def pack(lane: Lane, sequences: list[Sequence], fixed_rows: int | None) -> Batch:
    """Gather the states of the chosen images."""
    rows = _indices(lane, [sequence.slot for sequence in sequences])
    return Batch(
        lane=lane,
        sequences=sequences,
        plans=[lane.compiled(sequence.task.plan) for sequence in sequences],
        columns=lane.pool.columns.index_select(0, rows),
        paired=[i for i, sequence in enumerate(sequences) if sequence.needs_other],
        fixed_rows=fixed_rows,
    )


def evaluate(batch: Batch) -> tuple[Tensor, Tensor]:
    """One forward for all rows of the batch.

    Returns:
        Denoised predictions of the prompts ``[images, C, h, w]`` and of the second branches
        ``[paired, C, h, w]``.
    """
    images = len(batch.sequences)
    order = [*range(images), *batch.paired]
    x = batch.columns[:, 0].index_select(0, _indices(batch.lane, order))
    scalars = _columns_of(
        batch, order, lambda plan, i: (plan.t[i], plan.scale_in[i], plan.skip[i], plan.out[i])
    )
    t, scale_in, skip, out = scalars.unbind(1)
    conditioning = torch.stack(
        [_present(sequence.cond) for sequence in batch.sequences]
        + [_present(batch.sequences[i].uncond) for i in batch.paired]
    )
    raw = batch.lane.model.evaluate(
        _padded(_as_factor(scale_in, x) * x, batch.fixed_rows),
        _padded(t, batch.fixed_rows),
        _padded(conditioning, batch.fixed_rows),
    )[: len(order)]
    denoised = _as_factor(skip, x) * x + _as_factor(out, x) * raw
    return denoised[:images], denoised[images:]


def guide(batch: Batch, cond: Tensor, other: Tensor) -> Guidance:
    """Combine the predictions, each rule once for all of its rows."""
    denoised, x = cond.clone(), batch.columns[:, 0].clone()
    settled = torch.zeros(len(batch.sequences), dtype=torch.bool, device=cond.device)
    memory: dict[int, Tensor] = {}
    by_rule = _grouped(range(len(batch.paired)), lambda k: type(_task(batch, k).rule))
    for rule, members in by_rule.items():
        positions = [batch.paired[k] for k in members]
        rows = _stacked(batch, positions, members, cond, other)
        parameters = stack([batch.sequences[i].task.rule for i in positions], rows.x[:1])
        guided = rule.combine(*_fixed(rows, parameters, batch.fixed_rows))
        where = _indices(batch.lane, positions)
        denoised.index_copy_(0, where, guided.denoised[: len(positions)])
        x.index_copy_(0, where, guided.x[: len(positions)])
        if rule.memory_slots:
            memory.update(zip(positions, guided.memory, strict=False))
    adapting = [k for k in range(len(batch.paired)) if _task(batch, k).policy.adapts]
    by_policy = _grouped(adapting, lambda k: type(_task(batch, k).policy))
    for policy, members in by_policy.items():
        positions = [batch.paired[k] for k in members]
        rows = _stacked(batch, positions, members, cond, other)
        parameters = stack([batch.sequences[i].task.policy for i in positions], rows.x[:1])
        answer = policy.settled(*_fixed(rows, parameters, batch.fixed_rows))
        settled.index_copy_(0, _indices(batch.lane, positions), answer[: len(positions)])
    return Guidance(denoised, x, memory, settled)


def step(batch: Batch, guidance: Guidance) -> Tensor:
    """Advance every image by its stage: one batched operation, two where tables are elementwise.

    Returns:
        New states ``[images, K, C, h, w]``.
    """
    columns, K = batch.columns, batch.lane.pool.slots
    columns[:, 0] = guidance.x
    columns[:, K] = guidance.denoised
    for i, (sequence, plan) in enumerate(zip(batch.sequences, batch.plans, strict=True)):
        if plan.noisy[sequence.stage]:
            fresh = stage_noise(sequence.task.seed, sequence.stage, batch.lane.shape)
            columns[i, K + 1].copy_(fresh, non_blocking=True)
    state = torch.empty_like(columns[:, :K])
    for members in _grouped(range(len(batch.plans)), lambda i: batch.plans[i].elementwise).values():
        tables = torch.stack([batch.plans[i].tables[batch.sequences[i].stage] for i in members])
        where = _indices(batch.lane, members)
        langevin = _langevin(batch, members)
        moved = advance(
            _padded(columns.index_select(0, where), batch.fixed_rows),
            _padded(tables, batch.fixed_rows),
            None if langevin is None else _padded(langevin, batch.fixed_rows),
        )
        state.index_copy_(0, where, moved[: len(members)])
    _keep_known(batch, state)
    return state


def write_back(batch: Batch, state: Tensor, guidance: Guidance) -> None:
    """Put the new states and memories in the pool: the only write, when all else has succeeded."""
    pool = batch.lane.pool
    rows = _indices(batch.lane, [sequence.slot for sequence in batch.sequences])
    pool.columns[:, : pool.slots].index_copy_(0, rows, state)
    for i, kept in guidance.memory.items():
        pool.memory[batch.sequences[i].slot, : len(kept)] = kept


def _langevin(batch: Batch, members: list[int]) -> Tensor | None:
    """What the nonlinear stages among these need, ``[members, 3]``; none where all are linear."""
    if not any(batch.plans[i].langevin[batch.sequences[i].stage] for i in members):
        return None
    return _columns_of(
        batch, members, lambda plan, i: (plan.langevin[i], plan.alpha[i], plan.sigma[i])
    )


def _keep_known(batch: Batch, state: Tensor) -> None:
    """Inpainting: where the picture is kept, x is the known picture at the new noise level."""
    for i, (sequence, plan) in enumerate(zip(batch.sequences, batch.plans, strict=True)):
        known = sequence.known
        if known is not None:
            reached = sequence.stage + 1
            level = plan.alpha[reached] * known.latents + plan.sigma[reached] * known.noise
            state[i, 0] = torch.lerp(level, state[i, 0], known.repaint)


def _stacked(
    batch: Batch, positions: list[int], members: list[int], cond: Tensor, other: Tensor
) -> Rows:
    where = _indices(batch.lane, positions)
    x = batch.columns[:, 0].index_select(0, where)
    scalars = _columns_of(batch, positions, lambda plan, i: (plan.alpha[i], plan.sigma[i]))
    alpha, sigma = (_as_factor(column, x) for column in scalars.unbind(1))
    slots = _indices(batch.lane, [batch.sequences[i].slot for i in positions])
    closing = [batch.sequences[i].closes_step for i in positions]
    return Rows(
        cond=cond.index_select(0, where),
        other=other.index_select(0, _indices(batch.lane, members)),
        x=x,
        alpha=alpha,
        sigma=sigma,
        memory=batch.lane.pool.memory.index_select(0, slots),
        closes_step=_as_factor(torch.tensor(closing, device=x.device), x),
    )


def _fixed(
    rows: Rows, parameters: dict[str, Tensor], fixed_rows: int | None
) -> tuple[Rows, dict[str, Tensor]]:
    if fixed_rows is None:
        return rows, parameters
    names = ("cond", "other", "x", "alpha", "sigma", "memory", "closes_step")
    padded = {name: _padded(getattr(rows, name), fixed_rows) for name in names}
    return replace(rows, **padded), {k: _padded(v, fixed_rows) for k, v in parameters.items()}


def _padded(rows: Tensor, count: int | None) -> Tensor:
    """Repeat the first row until there are ``count``; as it is where no count is given."""
    if count is None or len(rows) == count:
        return rows
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])


def _columns_of(
    batch: Batch, positions: list[int], of: Callable[[CompiledPlan, int], tuple[float, ...]]
) -> Tensor:
    """Scalars of the current stage of each position, float32 ``[positions, scalars]``."""
    values = [of(batch.plans[i], batch.sequences[i].stage) for i in positions]
    return torch.tensor(values, dtype=torch.float32).to(batch.columns.device, non_blocking=True)


def _as_factor(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.view(-1, *[1] * (like.ndim - 1))


def _indices(lane: Lane, positions: list[int]) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64).to(lane.model.device, non_blocking=True)


def _grouped(positions: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    groups: dict[Key, list[int]] = {}
    for i in positions:
        groups.setdefault(key(i), []).append(i)
    return groups


def _task(batch: Batch, k: int) -> ImageTask:
    return batch.sequences[batch.paired[k]].task


def _present(conditioning: Tensor | None) -> Tensor:
    if conditioning is None:
        raise RuntimeError("a row was selected before its prompt was encoded")
    return conditioning
