"""The images of one tick, and the rows of their forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.state.compiled import CompiledPlan
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import AvoidedLatents, Sequence
    from server.engine.task import Aim, Group
    from server.models.conditioning import StackedConditioning


class References(NamedTuple):
    """Predictions whose prompts the classifier chose.

    Attributes:
        positions: of their images.
        rows: of the forward.
        conditioning: of what they are told, a row a reference.
        strengths: of the terms that lead away from them, ``[references]``.
    """

    positions: list[int]
    rows: list[int]
    conditioning: StackedConditioning
    strengths: Tensor


class AvoidedRow(NamedTuple):
    """A row of the forward that holds a picture which an image keeps away from."""

    row: int
    shown: AvoidedLatents


@dataclass(slots=True, eq=False)
class Batch:
    """The images of one tick and their tensors.

    Rows of the forward are the prompts' predictions, one an image in their order, then all others.

    Attributes:
        lane: of all of them.
        sequences: the images, one a row of the state.
        plans: their compiled plans.
        columns: a copy of their states, ``[images, K + 2, C, h, w]``.
        owners: the image of each row of the forward, as a position.
        numbers: which of its image's predictions each row is.
        others: rows that hold the rule's branches, by position, of the images that evaluate them.
        perturbed: of the images' first, second, ... perturbed predictions: position, row, scale.
        aims: what the classifier is asked for, of the images that ask it at this stage.
        pushed: images, by position, that move up its gradient.
        referred: rows of the predictions whose prompt it chooses, by position.
        avoided: rows that hold a picture, by position, of the images that keep away from one.
        groups: each with its images' positions, in their order.
        fixed_rows: where set, every operation that could depend on the batch size runs at this
            many rows, so that a row's bits do not depend on its company.
        references: what it chose.
    """

    lane: Lane
    sequences: list[Sequence]
    plans: list[CompiledPlan]
    columns: Tensor
    owners: list[int]
    numbers: list[int]
    others: dict[int, list[int]]
    perturbed: list[list[tuple[int, int, float]]]
    aims: dict[int, Aim]
    pushed: list[int]
    referred: dict[int, int]
    avoided: dict[int, AvoidedRow]
    groups: list[tuple[Group, list[int]]]
    fixed_rows: int | None
    references: References | None = None

    @property
    def rows(self) -> int:
        """Rows of the forward, padding not counted."""
        return len(self.owners)
