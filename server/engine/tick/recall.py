"""Stages that a step cache stands in for: what the network put out is kept, and recalled.

Whether an image recalls its next stage is decided at the end of this one, from the x that the step
has led to, and is known with the tick's one wait for the device. Images that recall take no row of
a forward: they go on in the same tick, until they need the network again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from guidance import StepCache
from guidance.step_cache import Evaluation
from server.engine.state.padding import padded
from server.engine.state.recollection import FIRST_OUTPUT, INPUT
from server.engine.tick.weave import Evaluated, scales_of

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.state.batch import Batch

__all__ = ["Foresight", "foresee", "keep", "recall"]


class NewNumbers(NamedTuple):
    """Numbers ``[positions, n]`` that the caches of some images count on."""

    positions: list[int]
    numbers: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Foresight:
    """What the step caches of a tick decided.

    Attributes:
        recalls: which images are to recall their next stage if they may, bool ``[images]``.
        numbers: of the images that have a cache.
    """

    recalls: Tensor
    numbers: list[NewNumbers]


def recall(batch: Batch) -> Evaluated:
    """The predictions of images that all recall this stage, in the place of a forward."""
    lane, memory = batch.lane, batch.lane.pool.cache_memory
    first = [batch.sequences[i].slot * memory.shape[1] for i in batch.owners]
    outputs = [row + FIRST_OUTPUT + n for row, n in zip(first, batch.numbers, strict=True)]
    inputs = [row + INPUT for row in first]
    kept = memory.flatten(0, 1)
    last = Evaluation(*(kept.index_select(0, lane.indices(rows)) for rows in (inputs, outputs)))
    x = batch.columns[:, 0].index_select(0, lane.indices(batch.owners))
    scales = scales_of(batch)
    points = scales.points(x)
    raw = StepCache.recalled(last, points)
    return Evaluated(points, raw, scales.denoised(x, raw))


def foresee(batch: Batch, stage: Evaluated, state: Tensor) -> Foresight:
    """Let the step caches decide about their images' next stages.

    Args:
        batch: the images.
        stage: their predictions at this stage, evaluated or recalled.
        state: their states after it, ``[images, K, C, h, w]``.
    """
    recalls = torch.zeros(len(batch.sequences), dtype=torch.bool, device=state.device)
    new: list[NewNumbers] = []
    by_kind: dict[type[StepCache], list[int]] = {}
    for i, sequence in enumerate(batch.sequences):
        if sequence.task.cache is not None:
            by_kind.setdefault(type(sequence.task.cache), []).append(i)
    for kind, members in by_kind.items():
        decided, numbers = _decided(batch, kind, members, stage, state)
        recalls.index_copy_(0, batch.lane.indices(members), decided)
        new.append(NewNumbers(members, numbers))
    return Foresight(recalls, new)


def keep(batch: Batch, stage: Evaluated, foresight: Foresight) -> None:
    """Remember the stage; to be called when all else has succeeded."""
    members = [i for new in foresight.numbers for i in new.positions]
    for new in foresight.numbers:
        for i, numbers in zip(new.positions, new.numbers.unbind(), strict=True):
            batch.sequences[i].recollection.numbers = numbers
    if not members or batch.recalls:
        return
    lane, memory = batch.lane, batch.lane.pool.cache_memory
    rows, places = list[int](), list[int]()
    for row, (i, number) in enumerate(zip(batch.owners, batch.numbers, strict=True)):
        sequence = batch.sequences[i]
        if sequence.task.cache is not None:
            rows.append(row)
            places.append(sequence.slot * memory.shape[1] + FIRST_OUTPUT + number)
    outputs = stage.raw.index_select(0, lane.indices(rows)).to(memory.dtype)
    memory.flatten(0, 1).index_copy_(0, lane.indices(places), outputs)
    slots = lane.indices([batch.sequences[i].slot for i in members])
    memory[:, INPUT].index_copy_(0, slots, stage.points.index_select(0, lane.indices(members)))
    for i in members:
        sequence = batch.sequences[i]
        sequence.recollection.predictions = frozenset((0, *sequence.ask.numbers))
        sequence.recollection.inside = sequence.inside


def _decided(
    batch: Batch, kind: type[StepCache], members: list[int], stage: Evaluated, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What the caches of one class say of their images, bool ``[members]``, and their numbers."""
    sequences, where = [batch.sequences[i] for i in members], batch.lane.indices(members)
    slots = batch.lane.indices([sequence.slot for sequence in sequences])
    memory = batch.lane.pool.cache_memory[:, : FIRST_OUTPUT + 1].index_select(0, slots)
    last = Evaluation(_fixed(batch, memory[:, INPUT]), _fixed(batch, memory[:, FIRST_OUTPUT]))
    x = _fixed(batch, stage.points.index_select(0, where))
    if batch.recalls:
        counted = [one for s in sequences if (one := s.recollection.numbers) is not None]
        numbers = _fixed(batch, torch.stack(counted))
    else:
        now = Evaluation(x, _fixed(batch, stage.raw.index_select(0, where)).to(x.dtype))
        numbers, last = kind.learned(last, now), now
    scales = torch.tensor([_scale_ahead(batch, i) for i in members], dtype=state.dtype)
    scales = scales.to(state.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))
    following = _fixed(batch, scales * state[:, 0].index_select(0, where))
    caches = [cache for s in sequences if (cache := s.task.cache) is not None]
    parameters = {k: _fixed(batch, value) for k, value in kind.parameters(caches, x).items()}
    decision = kind.decide(last, numbers, x, following, parameters)
    return decision.recalls[: len(members)], decision.numbers[: len(members)]


def _scale_ahead(batch: Batch, i: int) -> float:
    """Of the network's input at the next stage; after the last one any number will do."""
    scales = batch.plans[i].scale_in
    return scales[min(batch.sequences[i].stage + 1, len(scales) - 1)]


def _fixed(batch: Batch, rows: Tensor) -> Tensor:
    return padded(rows, batch.fixed_rows)
