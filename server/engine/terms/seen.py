"""What terms of one class are shown of a tick, stacked over the images that they act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from guidance import Edit
    from server.engine.state.lane import Lane
    from server.models.blend import Told
    from server.models.conditioning import Conditioning, StackedConditioning


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Where the rows of an image are in the forward.

    Attributes:
        term: rows that the term asked for, in its order.
        image: all rows of the image, by the number of the prediction; 0 is the prompt's own.
    """

    term: tuple[int, ...]
    image: Mapping[int, int]


@dataclass(slots=True, eq=False)
class ForwardRows:
    """What the rows of a forward are about to be given.

    Attributes:
        x: where each row is evaluated, ``[rows, C, h, w]``.
        conditioning: what each row is told.
        edits: what each row changes inside the network.
        against: what each row's attention is led away from; None where that of no row is.
    """

    x: Tensor
    conditioning: StackedConditioning
    edits: list[tuple[Edit, ...]]
    against: StackedConditioning | None = None

    def lead_away(self, rows: Tensor, texts: StackedConditioning) -> None:
        """Give rows a second text, that edits of theirs lead away from.

        Args:
            rows: int64 ``[n]`` on the device.
            texts: one a row.
        """
        self.against = (self.against or self.conditioning).put(rows, texts)

    def edit(self, row: int, edit: Edit) -> None:
        """Change something more inside the network for a row."""
        self.edits[row] = (*self.edits[row], edit)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The images that terms of one class act on in a tick.

    Attributes:
        lane: of all of them.
        points: where every image of the tick is evaluated, ``[images of the tick, C, h, w]``.
        positions: of these images among them.
        stages: at which each image is.
        seeds: of each image.
        alpha: signal scale of each image there.
        sigma: noise scale of each image there, above 0.
        told: what a row of each image is told there, by its text.
        states: what the term keeps of each image. A new value there is kept if the tick succeeds.
        groups: positions among these images of those that run in lockstep, in their order; an
            image of no group is by itself.
        fixed_rows: where set, tensors are padded to this many rows before any operation that could
            depend on the number of rows.
    """

    lane: Lane
    points: Tensor
    positions: Sequence[int]
    stages: Sequence[int]
    seeds: Sequence[int]
    alpha: Sequence[float]
    sigma: Sequence[float]
    told: Sequence[Callable[[Told], Conditioning]]
    states: list[Any]
    groups: Sequence[Sequence[int]]
    fixed_rows: int | None

    @property
    def x(self) -> Tensor:
        """Where each image is evaluated, ``[images, C, h, w]``."""
        return self.points.index_select(0, self.lane.indices(self.positions))

    def factors(self, values: Sequence[float]) -> Tensor:
        """Numbers, one an image, on the device as ``[images, 1, 1, 1]``."""
        return self.scalars(values).view(-1, *[1] * (self.points.ndim - 1))

    def scalars(self, values: Sequence[float]) -> Tensor:
        """Numbers, one an image, on the device as float32 ``[images]``."""
        # Not `new_tensor`, which waits for the device.
        made = torch.tensor(values, dtype=self.points.dtype)
        return made.to(self.points.device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What the network predicted for the images that terms of one class act on.

    Attributes:
        lane: of the images.
        rows: denoised predictions of all rows of the forward, ``[rows, C, h, w]``.
        positions: rows of the prompts' own predictions.
        terms: rows that the terms asked for, by image.
        branches: rows of the rule's branches, by image; empty where none was evaluated.
    """

    lane: Lane
    rows: Tensor
    positions: Sequence[int]
    terms: Sequence[Sequence[int]]
    branches: Sequence[Sequence[int]]

    def cond(self) -> Tensor:
        """For the prompts, ``[images, C, h, w]``."""
        return self._at(self.positions)

    def own(self, k: int = 0) -> Tensor:
        """The k-th that each term asked for, ``[images, C, h, w]``."""
        return self._at([rows[k] for rows in self.terms])

    def branch(self, k: int = 0) -> Tensor:
        """The k-th of each image's rule, where it was evaluated, ``[images, C, h, w]``."""
        return self._at([rows[k] for rows in self.branches])

    def _at(self, rows: Sequence[int]) -> Tensor:
        return self.rows.index_select(0, self.lane.indices(rows))
