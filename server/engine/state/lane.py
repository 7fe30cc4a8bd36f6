"""A lane: images of one model and one latent shape, which can share a forward."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from server.engine.state.compiled import CompiledPlan, compile_plan
from server.engine.state.pool import Pool
from server.engine.state.row_cap import RowCap

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from torch import Tensor, device

    from samplers import Plan
    from server.engine.cost_model import TickCost
    from server.engine.forwards import Forwards
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

INDICES_KEPT = 64
"""Tensors of indices: while the same images go on, all of a tick are those of the tick before."""


class Lane:
    """Model, states and compiled plans of one lane.

    Args:
        model: of all its images.
        shape: of their latents, ``(C, h, w)``.
        cost: of its ticks.
        most_rows: of a forward, memory allowing.
        forwards: fills up the rows of its forwards; None where they run as they are.
        mixes: equal for lanes of several sizes that can share a forward; None where none can.
        reads: cells that a forward reads for a row, in latents of its own size.
        fixed_rows: where set, the rows that every operation runs at.
    """

    def __init__(
        self,
        model: HostedModel,
        shape: tuple[int, int, int],
        cost: TickCost,
        most_rows: int,
        forwards: Forwards | None = None,
        mixes: Hashable = None,
        reads: float = 1.0,
        fixed_rows: int | None = None,
    ) -> None:
        self.model = model
        self.shape = shape
        self.area = shape[1] * shape[2]
        self.mixes = mixes
        self.reads = reads
        self.fixed_rows = fixed_rows
        self.pool = Pool(shape, model.device)
        self.cost = cost
        self.row_cap = RowCap(most_rows)
        self._forwards = forwards
        self._indices = lru_cache(INDICES_KEPT)(partial(_sent, model.device))
        # Keyed by identity: a compiled plan holds its plan, so the identity is not used again.
        self._compiled: WeakValueDictionary[tuple[int, int], CompiledPlan] = WeakValueDictionary()

    @property
    def sizes_known(self) -> int:
        """At how many numbers of rows forwards have run, where they are filled up."""
        return 0 if self._forwards is None else self._forwards.known

    def mixes_with(self, other: Lane) -> bool:
        """Whether images of both lanes can share a forward."""
        return self.mixes is not None and self.mixes == other.mixes

    def size_of(self, rows: int, *, mixed: bool = False) -> int:
        """The number of rows that a forward of so many rows runs at, those that fill up counted.

        Args:
            rows: that there are.
            mixed: whether some of them are of smaller sizes.
        """
        if self._forwards is None:
            return rows
        return self._forwards.size_of(rows, self.row_cap.rows, mixed=mixed)

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        if self._forwards is None:
            return self.model.evaluate(x, t, inputs)
        return self._forwards.evaluate(x, t, inputs, self.row_cap.rows)

    def evaluate_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        """See ``HostedModel.evaluate_sizes``; of the sizes, this lane's is the largest."""
        if self._forwards is None:
            return self.model.evaluate_sizes(x, t, inputs)
        return self._forwards.evaluate_sizes(x, t, inputs, self.row_cap.rows)

    def compiled(self, plan: Plan) -> CompiledPlan:
        """The plan on this lane's device, shared by all images under way that follow it."""
        key = id(plan), self.pool.slots
        made = self._compiled.get(key)
        if made is None:
            made = compile_plan(plan, self.model, self.pool.slots)
            self._compiled[key] = made
        return made

    def indices(self, positions: Sequence[int]) -> Tensor:
        """The positions as int64 on the lane's device, which nobody may change."""
        return self._indices(tuple(positions))


def _sent(to: device, positions: tuple[int, ...]) -> Tensor:
    """Made there, they would wait for the device."""
    return torch.tensor(positions, dtype=torch.int64).to(to, non_blocking=True)


def largest(lanes: Iterable[Lane]) -> Lane:
    """The lane whose size all rows of a forward of several cost as much as."""
    return max(lanes, key=lambda lane: lane.area)
