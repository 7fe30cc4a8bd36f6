"""What terms of one class see of a tick, stacked over the images that they act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from guidance import Edit
    from server.engine.state.lane import Lane
    from server.models.blend import TextPrompt
    from server.models.conditioning import Conditioning, StackedConditioning


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Positions of an image's rows in the forward pass.

    Attributes:
        term: rows that the term requested, in its order.
        image: all rows of the image, by the number of the prediction; 0 is the prompt's own.
    """

    term: tuple[int, ...]
    image: Mapping[int, int]


@dataclass(slots=True, eq=False)
class ForwardRows:
    """Inputs of the rows of a forward pass, before it runs.

    Attributes:
        x: latents at which each row is evaluated, ``[rows, C, h, w]``.
        conditioning: conditioning of each row.
        edits: changes of each row inside the network.
        against: second text that each row's attention is led away from; None if no row has one.
    """

    x: Tensor
    conditioning: StackedConditioning
    edits: list[tuple[Edit, ...]]
    against: StackedConditioning | None = None

    def lead_away(self, rows: Tensor, texts: StackedConditioning) -> None:
        """Give rows a second text, which their edits lead away from.

        Args:
            rows: rows, int64 ``[n]`` on the device.
            texts: one text per row.
        """
        self.against = (self.against or self.conditioning).put(rows, texts)

    def edit(self, row: int, edit: Edit) -> None:
        """Add a change inside the network to a row."""
        self.edits[row] = (*self.edits[row], edit)


@dataclass(frozen=True, slots=True, eq=False)
class TermContext:
    """The images that terms of one class act on in a tick.

    Attributes:
        lane: lane of all of them.
        points: latents of every image of the tick, ``[images of the tick, C, h, w]``.
        positions: positions of these images among those of the tick.
        stages: stage of each image.
        seeds: seed of each image.
        alpha: signal scale of each image at its stage.
        sigma: noise scale of each image at its stage, above 0.
        conditioning_for: function of each image that returns the conditioning of a text.
        states: what the term keeps of each image. A new value there is kept if the tick succeeds.
        groups: positions among these images of those that run in lockstep, in order; an image
            without a group is one of its own.
        fixed_rows: number of rows to which tensors are padded before any operation that could
            depend on the number of rows; None if it varies.
    """

    lane: Lane
    points: Tensor
    positions: Sequence[int]
    stages: Sequence[int]
    seeds: Sequence[int]
    alpha: Sequence[float]
    sigma: Sequence[float]
    conditioning_for: Sequence[Callable[[TextPrompt], Conditioning]]
    states: list[Any]
    groups: Sequence[Sequence[int]]
    fixed_rows: int | None

    @property
    def x(self) -> Tensor:
        """Latents at which each image is evaluated, ``[images, C, h, w]``."""
        return self.points.index_select(0, self.lane.indices(self.positions))

    def factors(self, values: Sequence[float]) -> Tensor:
        """Numbers, one per image, on the device as ``[images, 1, 1, 1]``."""
        return self.scalars(values).view(-1, *[1] * (self.points.ndim - 1))

    def scalars(self, values: Sequence[float]) -> Tensor:
        """Numbers, one per image, on the device as float32 ``[images]``."""
        # Not `new_tensor`, which waits for the device.
        made = torch.tensor(values, dtype=self.points.dtype)
        return made.to(self.points.device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Predictions of the network for the images that terms of one class act on.

    Attributes:
        lane: lane of the images.
        rows: denoised predictions of all rows of the forward pass, ``[rows, C, h, w]``.
        positions: rows of the prompts' own predictions.
        terms: rows that the terms requested, by image.
        branches: rows of the rule's branches, by image; empty if they were not evaluated.
    """

    lane: Lane
    rows: Tensor
    positions: Sequence[int]
    terms: Sequence[Sequence[int]]
    branches: Sequence[Sequence[int]]

    def cond(self) -> Tensor:
        """Predictions for the prompts, ``[images, C, h, w]``."""
        return self._at(self.positions)

    def own(self, k: int = 0) -> Tensor:
        """The k-th prediction that each term requested, ``[images, C, h, w]``."""
        return self._at([rows[k] for rows in self.terms])

    def branch(self, k: int = 0) -> Tensor:
        """The k-th branch of each image's rule, if it was evaluated, ``[images, C, h, w]``."""
        return self._at([rows[k] for rows in self.branches])

    def _at(self, rows: Sequence[int]) -> Tensor:
        return self.rows.index_select(0, self.lane.indices(rows))
