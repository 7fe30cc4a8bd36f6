"""The images of one tick, the terms that act on them, and the rows of their forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.engine.terms.seen import OwnRows, Predictions, Seen

if TYPE_CHECKING:
    from collections.abc import Sequence as Listed

    from torch import Tensor

    from server.engine.guidance_plan import Acting
    from server.engine.state.compiled import CompiledPlan
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import Sequence
    from server.engine.terms.term import Term


@dataclass(slots=True, eq=False)
class StackedTerms:
    """Terms of one class that act in a tick, at most one an image.

    Attributes:
        kind: their class.
        positions: of their images.
        indices: of each term among those of its image.
        terms: one an image.
        rows: of the forward, that each of them asked for.
        states: what each of them keeps of its image.
    """

    kind: type[Term]
    positions: list[int] = field(default_factory=list[int])
    indices: list[int] = field(default_factory=list[int])
    terms: list[Term] = field(default_factory=list["Term"])
    rows: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    states: list[Any] = field(default_factory=list[Any])

    def add(self, position: int, sequence: Sequence, acting: Acting, first: int) -> None:
        """Take in a term of an image, whose rows beside the prompt's begin at ``first``."""
        self.positions.append(position)
        self.indices.append(acting.index)
        self.terms.append(sequence.task.terms[acting.index])
        self.rows.append(tuple(first + row for row in acting.rows))
        self.states.append(sequence.term_states[acting.index])


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
        firsts: where each image's rows beside the prompt's begin.
        others: rows that hold the rule's branches, by position, of the images that evaluate them.
        terms: those that act, in the order in which they do.
    """

    lane: Lane
    sequences: list[Sequence]
    plans: list[CompiledPlan]
    columns: Tensor
    owners: list[int]
    numbers: list[int]
    firsts: list[int]
    others: dict[int, list[int]]
    terms: list[StackedTerms]

    @property
    def fixed_rows(self) -> int | None:
        """Where set, every operation that could depend on the batch size runs at so many rows.

        A row's bits do not depend on its company then.
        """
        return self.lane.fixed_rows

    @property
    def rows(self) -> int:
        """Rows of the forward, padding not counted."""
        return len(self.owners)

    @property
    def recalls(self) -> bool:
        """Whether its images recall this stage, so that there is no forward; all do or none."""
        return self.sequences[0].recalls

    def rows_of(self, stacked: StackedTerms) -> list[OwnRows]:
        """Where the rows of the terms' images are."""
        found: list[OwnRows] = []
        for i, own in zip(stacked.positions, stacked.rows, strict=True):
            numbers, first = self.sequences[i].ask.numbers, self.firsts[i]
            found.append(OwnRows(own, {0: i} | {n: first + k for k, n in enumerate(numbers)}))
        return found

    def seen_by(self, stacked: StackedTerms, *, padded: bool) -> Seen:
        """The terms' images.

        Args:
            stacked: the terms.
            padded: with the first image repeated until there are ``fixed_rows``.
        """
        sequences = [self.sequences[i] for i in stacked.positions]
        stages = [sequence.stage for sequence in sequences]
        plans = [self.plans[i] for i in stacked.positions]
        of = self.filled if padded else list
        return Seen(
            lane=self.lane,
            points=self.columns[:, 0],
            positions=of(stacked.positions),
            stages=of(stages),
            seeds=of([sequence.task.seed for sequence in sequences]),
            alpha=of([plan.alpha[at] for plan, at in zip(plans, stages, strict=True)]),
            sigma=of([plan.sigma[at] for plan, at in zip(plans, stages, strict=True)]),
            told=of([sequence.told for sequence in sequences]),
            states=of(stacked.states),
            groups=_groups_of(sequences),
            fixed_rows=self.fixed_rows,
        )

    def predicted_for(self, stacked: StackedTerms, predictions: Tensor) -> Predictions:
        """The predictions of the terms' images, padded to ``fixed_rows``.

        Args:
            stacked: the terms.
            predictions: of all rows of the forward, ``[rows, C, h, w]``.
        """
        positions = self.filled(stacked.positions)
        branches = [self.others.get(i, []) for i in positions]
        return Predictions(self.lane, predictions, positions, self.filled(stacked.rows), branches)

    def filled(self, values: Listed[Any]) -> list[Any]:
        """The values, and the first one again until there are ``fixed_rows``."""
        missing = 0 if self.fixed_rows is None else self.fixed_rows - len(values)
        return [*values, *[values[0]] * missing]


def _groups_of(sequences: Listed[Sequence]) -> list[list[int]]:
    """Positions of images that run in lockstep, in their order; others are by themselves."""
    groups: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        group = sequence.task.group
        groups.setdefault(id(sequence) if group is None else id(group), []).append(i)
    return list(groups.values())
