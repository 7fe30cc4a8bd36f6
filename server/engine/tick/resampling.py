"""Resampling within groups: images that take over the states of others after a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Listed

    from torch import Tensor

    from server.engine.state.batch import Batch
    from server.engine.state.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Resampling:
    """Which image's state each image of a tick continues from.

    Attributes:
        origins: for every image, the position of the image whose state it takes over; mostly its
            own.
        effective: effective number of images in the group, by position.
    """

    origins: list[int]
    effective: dict[int, float]

    def taken_over(self, rows: Tensor) -> Tensor:
        """Rows of ``[images, ...]`` after resampling."""
        if self.origins == list(range(len(self.origins))):
            return rows
        return rows.index_select(0, torch.tensor(self.origins).to(rows.device))

    def note(self, sequences: Listed[Sequence]) -> None:
        """Record in the images what they descend from."""
        lines = [sequences[origin].ancestor for origin in self.origins]
        for sequence, ancestor in zip(sequences, lines, strict=True):
            sequence.ancestor = ancestor
        for i, size in self.effective.items():
            sequences[i].effective.append(size)


def resample(batch: Batch, predictions: Tensor, sound: Listed[bool]) -> Resampling | None:
    """Let the terms that resample choose which images continue from which.

    Args:
        batch: images of one lane.
        predictions: predictions of all rows of the forward pass, ``[rows, C, h, w]``.
        sound: whether each image's guided prediction is finite.

    Returns:
        None if no term resamples at this stage.
    """
    origins = list(range(len(batch.sequences)))
    sizes: dict[int, float] = {}
    for stacked in batch.terms:
        if not stacked.kind.resamples:
            continue
        found = stacked.kind.resample(
            stacked.terms,
            [sound[i] for i in stacked.positions],
            batch.predicted_for(stacked, predictions),
            batch.term_context(stacked, padded=False),
        )
        for i, origin in zip(stacked.positions, found.origins, strict=True):
            origins[i] = stacked.positions[origin]
        sizes |= dict(zip(stacked.positions, found.effective, strict=True))
    return Resampling(origins, sizes) if sizes else None
