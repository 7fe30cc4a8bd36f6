"""The images of one tick and one lane, the terms that act on them, and their rows.

A row is one entry of the forward pass's batch: one prediction for one image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.engine.terms.seen import ImageRows, Predictions, TermContext

if TYPE_CHECKING:
    from collections.abc import Sequence as Listed

    from torch import Tensor

    from server.engine.guidance_plan import ActiveTerm
    from server.engine.state.compiled import CompiledPlan
    from server.engine.state.lane import Lane
    from server.engine.state.sequence import Sequence
    from server.engine.terms.term import Term


@dataclass(slots=True, eq=False)
class StackedTerms:
    """Terms of one class that act in a tick, at most one per image.

    Attributes:
        kind: class of the terms.
        positions: positions of their images in the batch.
        indices: index of each term among those of its image.
        terms: terms, one per image.
        rows: rows of the forward pass that each of them requested.
        states: state that each of them keeps of its image.
    """

    kind: type[Term]
    positions: list[int] = field(default_factory=list[int])
    indices: list[int] = field(default_factory=list[int])
    terms: list[Term] = field(default_factory=list["Term"])
    rows: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    states: list[Any] = field(default_factory=list[Any])

    def add(self, position: int, sequence: Sequence, acting: ActiveTerm, first: int) -> None:
        """Add a term of an image whose further rows, after the prompt's, begin at ``first``."""
        self.positions.append(position)
        self.indices.append(acting.index)
        self.terms.append(sequence.task.terms[acting.index])
        self.rows.append(tuple(first + row for row in acting.rows))
        self.states.append(sequence.term_states[acting.index])


@dataclass(slots=True, eq=False)
class Batch:
    """The images of one lane in a tick, and their tensors.

    Rows of the forward pass are first the prompts' predictions, in the order of the images, then
    all others.

    Attributes:
        lane: lane of all images.
        sequences: images, one per row of the state.
        plans: compiled plans of the images.
        columns: copy of their states, ``[images, K + 2, C, h, w]``.
        owners: image of each row of the forward pass, as a position.
        numbers: number of each row's prediction among those of its image.
        firsts: first row of each image after the prompt's.
        others: rows of the rule's branches by position, for images that evaluate them.
        terms: terms that act, in order.
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
        """Number of rows at which every operation runs that could depend on the batch size.

        If it is set, a row's bits do not depend on the other rows.
        """
        return self.lane.fixed_rows

    @property
    def rows(self) -> int:
        """Number of rows of the forward pass, without padding."""
        return len(self.owners)

    @property
    def recalls(self) -> bool:
        """Whether the images recall this stage, without a forward pass; all do or none."""
        return self.sequences[0].recalls

    def rows_of(self, stacked: StackedTerms) -> list[ImageRows]:
        """Locate the rows of the terms' images."""
        found: list[ImageRows] = []
        for i, own in zip(stacked.positions, stacked.rows, strict=True):
            numbers, first = self.sequences[i].ask.numbers, self.firsts[i]
            found.append(ImageRows(own, {0: i} | {n: first + k for k, n in enumerate(numbers)}))
        return found

    def term_context(self, stacked: StackedTerms, *, padded: bool) -> TermContext:
        """Collect what terms see of their images.

        Args:
            stacked: terms of one class.
            padded: whether to repeat the first image until there are ``fixed_rows``.
        """
        sequences = [self.sequences[i] for i in stacked.positions]
        stages = [sequence.stage for sequence in sequences]
        plans = [self.plans[i] for i in stacked.positions]
        of = self.filled if padded else list
        return TermContext(
            lane=self.lane,
            points=self.columns[:, 0],
            positions=of(stacked.positions),
            stages=of(stages),
            seeds=of([sequence.task.seed for sequence in sequences]),
            alpha=of([plan.alpha[at] for plan, at in zip(plans, stages, strict=True)]),
            sigma=of([plan.sigma[at] for plan, at in zip(plans, stages, strict=True)]),
            conditioning_for=of([sequence.conditioning_for for sequence in sequences]),
            states=of(stacked.states),
            groups=_groups_of(sequences),
            fixed_rows=self.fixed_rows,
        )

    def predicted_for(self, stacked: StackedTerms, predictions: Tensor) -> Predictions:
        """Collect the predictions of the terms' images, padded to ``fixed_rows``.

        Args:
            stacked: terms of one class.
            predictions: predictions of all rows of the forward pass, ``[rows, C, h, w]``.
        """
        positions = self.filled(stacked.positions)
        branches = [self.others.get(i, []) for i in positions]
        return Predictions(self.lane, predictions, positions, self.filled(stacked.rows), branches)

    def filled(self, values: Listed[Any]) -> list[Any]:
        """The values, padded with the first one until there are ``fixed_rows``."""
        missing = 0 if self.fixed_rows is None else self.fixed_rows - len(values)
        return [*values, *[values[0]] * missing]


def _groups_of(sequences: Listed[Sequence]) -> list[list[int]]:
    """Positions of images by group, in order; an image without a group is one of its own."""
    groups: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        group = sequence.task.group
        groups.setdefault(id(sequence) if group is None else id(group), []).append(i)
    return list(groups.values())
