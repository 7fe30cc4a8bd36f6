"""A lane: the images that can share a forward, of one model and one latent shape."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from server.engine.state.compiled import CompiledPlan, compile_plan
from server.engine.state.pool import Pool
from server.engine.state.row_cap import RowCap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from samplers import Plan
    from server.engine.cost_model import TickCost
    from server.engine.forwards import Forwards
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs


class Lane:
    """Model, states and compiled plans of one lane.

    Args:
        model: of all its images.
        shape: of their latents, ``(C, h, w)``.
        cost: of its ticks.
        most_rows: of a forward, memory allowing.
        forwards: fills up the rows of its forwards; None where they run as they are.
    """

    def __init__(
        self,
        model: HostedModel,
        shape: tuple[int, int, int],
        cost: TickCost,
        most_rows: int,
        forwards: Forwards | None = None,
    ) -> None:
        self.model = model
        self.shape = shape
        self.pool = Pool(shape, model.device)
        self.cost = cost
        self.row_cap = RowCap(most_rows)
        self._forwards = forwards
        # Keyed by identity: a compiled plan holds its plan, so the identity is not used again.
        self._compiled: WeakValueDictionary[tuple[int, int], CompiledPlan] = WeakValueDictionary()

    @property
    def sizes_known(self) -> int:
        """At how many numbers of rows forwards have run, where they are filled up."""
        return 0 if self._forwards is None else len(self._forwards.sizes.known)

    def size_of(self, rows: int) -> int:
        """The number of rows that a forward of so many rows runs at, those that fill up counted."""
        return rows if self._forwards is None else self._forwards.size_of(rows, self.row_cap.rows)

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        if self._forwards is None:
            return self.model.evaluate(x, t, inputs)
        return self._forwards.evaluate(x, t, inputs, self.row_cap.rows)

    def compiled(self, plan: Plan) -> CompiledPlan:
        """The plan on this lane's device, shared by all images under way that follow it."""
        key = id(plan), self.pool.slots
        made = self._compiled.get(key)
        if made is None:
            made = compile_plan(plan, self.model, self.pool.slots)
            self._compiled[key] = made
        return made

    def indices(self, positions: Sequence[int]) -> Tensor:
        """The positions as int64 on the lane's device, sent without waiting for it."""
        return torch.tensor(positions, dtype=torch.int64).to(self.model.device, non_blocking=True)
