"""Stages for which a step cache replaces the network: its last outputs are kept and recalled.

Whether an image recalls its next stage is decided at the end of the current one, from the x that
the step has led to. The host learns the decision with the tick's one wait for the device. Images
that recall take no row of a forward pass. They continue in the same tick, until they need the
network again or the tick has taken too long.

Caches see every network as one that predicts the velocity, as do the networks for which they were
published; see :class:`guidance.step_cache.Evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from guidance import StepCache
from guidance.step_cache import Evaluation
from server.engine.state.padding import padded
from server.engine.state.recollection import FIRST_OUTPUT, INPUT
from server.engine.tick.answers import answering
from server.engine.tick.weave import Evaluated

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.state.batch import Batch

__all__ = ["CacheDecision", "decide_caches", "keep", "recall"]


class NewNumbers(NamedTuple):
    """New accumulated numbers ``[positions, n]`` of the caches of some images."""

    positions: list[int]
    numbers: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CacheDecision:
    """What the step caches of a tick have seen and decided.

    Attributes:
        recalls: whether each image recalls its next stage if it may, bool ``[images]``; None if no
            image has a cache.
        numbers: new numbers of the images that have a cache.
        rows: all rows of the batch, as caches see them; None if no image has a cache.
    """

    recalls: Tensor | None
    numbers: list[NewNumbers]
    rows: Evaluation | None


class VelocityFactors(NamedTuple):
    """Factors that turn each row into one of a velocity network, ``[rows, 1, 1, 1]``.

    Attributes:
        scale: factor of x in the input of a network that predicts the velocity.
        skip: factor of x in the prediction.
        out: factor of the velocity in the prediction, never 0.
    """

    scale: Tensor
    skip: Tensor
    out: Tensor

    def seen(self, stage: Evaluated) -> Evaluation:
        """The predictions, expressed as inputs and outputs of such a network."""
        return Evaluation(self.scale * stage.x, (stage.denoised - self.skip * stage.x) / self.out)


def recall(batch: Batch) -> Evaluated:
    """Predict without a forward pass, for images that all recall this stage."""
    lane, memory = batch.lane, batch.lane.pool.cache_memory
    first = [batch.sequences[i].slot * memory.shape[1] for i in batch.owners]
    outputs = [row + FIRST_OUTPUT + n for row, n in zip(first, batch.numbers, strict=True)]
    inputs = [row + INPUT for row in first]
    kept = memory.flatten(0, 1)
    last = Evaluation(*(kept.index_select(0, lane.indices(rows)) for rows in (inputs, outputs)))
    x = batch.columns[:, 0].index_select(0, lane.indices(batch.owners))
    form = _as_velocity(batch)
    velocity = StepCache.recalled(last, form.scale * x)
    return Evaluated(x, form.skip * x + form.out * velocity)


def decide_caches(batch: Batch, stage: Evaluated, state: Tensor) -> CacheDecision:
    """Let the step caches decide about the next stages of their images.

    Args:
        batch: images of one lane.
        stage: their predictions at this stage, evaluated or recalled.
        state: their states after it, ``[images, K, C, h, w]``.
    """
    by_kind: dict[type[StepCache], list[int]] = {}
    for i, sequence in enumerate(batch.sequences):
        if sequence.task.cache is not None:
            by_kind.setdefault(type(sequence.task.cache), []).append(i)
    if not by_kind:
        return CacheDecision(None, [], None)
    recalls = torch.zeros(len(batch.sequences), dtype=torch.bool, device=state.device)
    rows = _as_velocity(batch).seen(stage)
    new: list[NewNumbers] = []
    for kind, members in by_kind.items():
        decided, numbers = _decided(batch, kind, members, rows, state)
        recalls.index_copy_(0, batch.lane.indices(members), decided)
        new.append(NewNumbers(members, numbers))
    return CacheDecision(recalls, new, rows)


def keep(batch: Batch, foresight: CacheDecision) -> None:
    """Store what caches keep of the stage; called only once all else has succeeded."""
    for new in foresight.numbers:
        for i, numbers in zip(new.positions, new.numbers.unbind(), strict=True):
            batch.sequences[i].recollection.numbers = numbers
    if foresight.rows is None or batch.recalls:
        return
    lane, memory = batch.lane, batch.lane.pool.cache_memory
    rows, places = list[int](), list[int]()
    for row, (i, number) in enumerate(zip(batch.owners, batch.numbers, strict=True)):
        sequence = batch.sequences[i]
        if sequence.task.cache is not None:
            rows.append(row)
            places.append(sequence.slot * memory.shape[1] + FIRST_OUTPUT + number)
    outputs = foresight.rows.output.index_select(0, lane.indices(rows))
    memory.flatten(0, 1).index_copy_(0, lane.indices(places), outputs)
    members = [i for new in foresight.numbers for i in new.positions]
    slots = lane.indices([batch.sequences[i].slot for i in members])
    inputs = foresight.rows.x.index_select(0, lane.indices(members))
    memory[:, INPUT].index_copy_(0, slots, inputs)
    for i in members:
        sequence = batch.sequences[i]
        sequence.recollection.predictions = frozenset((0, *sequence.ask.numbers))
        sequence.recollection.inside = sequence.inside


def _decided(
    batch: Batch, kind: type[StepCache], members: list[int], rows: Evaluation, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Decisions of the caches of one class, bool ``[members]``, and their new numbers."""
    sequences, where = [batch.sequences[i] for i in members], batch.lane.indices(members)
    slots = batch.lane.indices([sequence.slot for sequence in sequences])
    memory = batch.lane.pool.cache_memory[:, : FIRST_OUTPUT + 1].index_select(0, slots)
    last = Evaluation(_fixed(batch, memory[:, INPUT]), _fixed(batch, memory[:, FIRST_OUTPUT]))
    now = Evaluation(*(_fixed(batch, one.index_select(0, where)) for one in rows))
    caches = [cache for s in sequences if (cache := s.task.cache) is not None]
    if batch.recalls:
        counted = [one for s in sequences if (one := s.recollection.numbers) is not None]
        numbers = _fixed(batch, torch.stack(counted))
    else:
        with answering(caches[0], now.x.device):
            numbers, last = kind.learned(last, now), now
    ahead = _factors(batch, [_scale_ahead(batch, i) for i in members])
    following = _fixed(batch, ahead * state[:, 0].index_select(0, where))
    with answering(caches[0], now.x.device):
        given = kind.parameters(caches, now.x)
        parameters = {k: _fixed(batch, value) for k, value in given.items()}
        decision = kind.decide(last, numbers, now.x, following, parameters)
    return decision.recalls[: len(members)], decision.numbers[: len(members)]


def _as_velocity(batch: Batch) -> VelocityFactors:
    stages = [sequence.stage for sequence in batch.sequences]
    scalars = [batch.plans[i].as_velocity[stages[i]] for i in batch.owners]
    return VelocityFactors(*_factors(batch, scalars).unbind(1))


def _scale_ahead(batch: Batch, i: int) -> float:
    """Factor of x at the next stage; after the last one any number will do."""
    scalars = batch.plans[i].as_velocity
    return scalars[min(batch.sequences[i].stage + 1, len(scalars) - 1)][0]


def _factors(batch: Batch, values: list[float] | list[tuple[float, float, float]]) -> Tensor:
    """Numbers on the device as float32 ``[..., 1, 1, 1]``, copied without blocking."""
    numbers = torch.tensor(values, dtype=torch.float32)
    return numbers.view(*numbers.shape, 1, 1, 1).to(batch.lane.model.device, non_blocking=True)


def _fixed(batch: Batch, rows: Tensor) -> Tensor:
    return padded(rows, batch.fixed_rows)
