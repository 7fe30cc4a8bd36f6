"""A lane: images of one model and one latent shape, which can share a forward pass."""

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

MAX_CACHED_INDICES = 64
"""Number of cached index tensors: while the same images run, each tick needs those of the last."""


class Lane:
    """Model, states and compiled plans of one lane.

    Args:
        model: model of all its images.
        shape: shape of their latents, ``(C, h, w)``.
        cost: cost of its ticks.
        max_rows: maximum number of rows in a forward pass, if memory allows.
        forwards: object that pads its forward passes; None to run them as they are.
        mixes: equal for lanes of different sizes that can share a forward pass; None if it cannot.
        reads: cells that a forward pass reads per row, relative to the cells of a latent.
        fixed_rows: number of rows at which every operation runs; None if it varies.
    """

    def __init__(
        self,
        model: HostedModel,
        shape: tuple[int, int, int],
        cost: TickCost,
        max_rows: int,
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
        self.row_cap = RowCap(max_rows)
        self._forwards = forwards
        self._indices = lru_cache(MAX_CACHED_INDICES)(partial(_sent, model.device))
        # Keyed by identity: a compiled plan holds its plan, so the identity is not reused.
        self._compiled: WeakValueDictionary[tuple[int, int], CompiledPlan] = WeakValueDictionary()

    @property
    def sizes_known(self) -> int:
        """Count of the numbers of rows that forward passes have run at, if they are padded."""
        return 0 if self._forwards is None else self._forwards.known

    def mixes_with(self, other: Lane) -> bool:
        """Whether images of both lanes can share a forward pass."""
        return self.mixes is not None and self.mixes == other.mixes

    def size_of(self, rows: int, *, mixed: bool = False) -> int:
        """Return the number of rows that a forward pass runs at, with padding.

        Args:
            rows: number of rows before padding.
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
        """See ``HostedModel.evaluate_sizes``; this lane's size is the largest of them."""
        if self._forwards is None:
            return self.model.evaluate_sizes(x, t, inputs)
        return self._forwards.evaluate_sizes(x, t, inputs, self.row_cap.rows)

    def compiled(self, plan: Plan) -> CompiledPlan:
        """Return the plan compiled for this lane, shared by all images under way that follow it."""
        key = id(plan), self.pool.slots
        made = self._compiled.get(key)
        if made is None:
            made = compile_plan(plan, self.model, self.pool.slots)
            self._compiled[key] = made
        return made

    def indices(self, positions: Sequence[int]) -> Tensor:
        """Positions as an int64 tensor on the lane's device; cached, so never change it."""
        return self._indices(tuple(positions))


def _sent(to: device, positions: tuple[int, ...]) -> Tensor:
    """Copy positions without blocking; creating them on the device would wait for it."""
    return torch.tensor(positions, dtype=torch.int64).to(to, non_blocking=True)


def largest(lanes: Iterable[Lane]) -> Lane:
    """The lane of the largest size, whose cost all rows of a mixed forward pass have."""
    return max(lanes, key=lambda lane: lane.area)
