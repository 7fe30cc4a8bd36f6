"""A lane: the images that can share a forward, of one model and one latent shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from server.engine.state.compiled import CompiledPlan, compile_plan
from server.engine.state.pool import Pool
from server.lru import Kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from samplers import Plan
    from server.models.hosted import HostedModel

PLANS_KEPT_BYTES = 512 * 2**20


class Lane:
    """Model, states and compiled plans of one lane."""

    def __init__(self, model: HostedModel, shape: tuple[int, int, int]) -> None:
        self.model = model
        self.shape = shape
        self.pool = Pool(shape, model.device)
        # Keyed by identity and holding the plan, so that an identity is never used again.
        self._plans: Kept[tuple[int, int], tuple[Plan, CompiledPlan]] = Kept(
            PLANS_KEPT_BYTES, lambda kept: kept[0].tables.nbytes + kept[1].tables.nbytes
        )

    def compiled(self, plan: Plan) -> CompiledPlan:
        """The plan on this lane's device, kept for the next image that shares it."""

        def make() -> tuple[Plan, CompiledPlan]:
            model = self.model
            return plan, compile_plan(plan, model.facts, self.pool.slots, model.device)

        return self._plans.get((id(plan), self.pool.slots), make)[1]

    def indices(self, positions: Sequence[int]) -> Tensor:
        """The positions as int64 on the lane's device, sent without waiting for it."""
        return torch.tensor(positions, dtype=torch.int64).to(self.model.device, non_blocking=True)
