"""Images that run in lockstep, and particles among them that are resampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from guidance.feynman_kac import ancestors, effective, increments
from server.engine.state.noise import stage_uniform

if TYPE_CHECKING:
    from collections.abc import Sequence as Listed

    from torch import Tensor

    from server.engine.state.batch import Batch
    from server.engine.state.sequence import Sequence
    from server.engine.task import Group


def groups_of(sequences: Listed[Sequence]) -> list[tuple[Group, list[int]]]:
    """Each group with its images' positions, in their order; images of no group are left out."""
    groups: dict[int, tuple[Group, list[int]]] = {}
    for i, sequence in enumerate(sequences):
        if (group := sequence.task.group) is not None:
            groups.setdefault(id(group), (group, []))[1].append(i)
    return list(groups.values())


@dataclass(frozen=True, slots=True, eq=False)
class Resampling:
    """Which images of a tick go on from which.

    Attributes:
        origins: of every image, the position of the image whose state it takes over; mostly its
            own.
        effective: effective number of particles, by position.
    """

    origins: list[int]
    effective: dict[int, float]

    def taken_over(self, rows: Tensor) -> Tensor:
        """What each image has of ``[images, ...]`` afterwards."""
        if self.origins == list(range(len(self.origins))):
            return rows
        return rows.index_select(0, torch.tensor(self.origins).to(rows.device))

    def note(self, sequences: Listed[Sequence]) -> None:
        """Tell the images what became of them."""
        lines = [sequences[origin].ancestor for origin in self.origins]
        for sequence, ancestor in zip(sequences, lines, strict=True):
            sequence.ancestor = ancestor
        for i, size in self.effective.items():
            sequences[i].effective.append(size)


def resample(batch: Batch, predictions: Tensor, sound: Listed[bool]) -> Resampling | None:
    """Weigh the particles of each group by what the stage adds, and draw who goes on.

    A particle that is not sound has no weight, so another one takes its place. After its last
    stage a group is not resampled.

    Args:
        batch: with groups among its images.
        predictions: of all rows of the forward, ``[rows, C, h, w]``.
        sound: whether each image's guided prediction is finite.

    Returns:
        None if no group is resampled.
    """
    origins = list(range(len(batch.sequences)))
    sizes: dict[int, float] = {}
    for group, members in batch.groups:
        lead = batch.sequences[members[0]]
        if group.particles is None or lead.stage + 1 == lead.task.plan.evaluations:
            continue
        gained = np.array(_increments(batch, members, predictions))
        gained[[not sound[i] for i in members]] = np.nan
        weights = group.particles.weights(gained)
        drawn = ancestors(weights, stage_uniform(lead.task.seed, lead.stage))
        for i, origin in zip(members, drawn, strict=True):
            origins[i] = members[origin]
            sizes[i] = effective(weights)
    return Resampling(origins, sizes) if sizes else None


def _increments(batch: Batch, members: list[int], predictions: Tensor) -> list[float]:
    lead = batch.sequences[members[0]]
    plan, stage = lead.task.plan, lead.stage
    rows = torch.tensor([members, [batch.others[i][0] for i in members]])
    cond, other = (predictions.index_select(0, where) for where in rows.to(predictions.device))
    snr = np.square(plan.alpha[stage : stage + 2] / plan.sigma[stage : stage + 2])
    scale = float(getattr(lead.task.rule, "scale", 1.0))
    return increments(cond, other, scale, float(snr[0]), float(snr[1])).tolist()
