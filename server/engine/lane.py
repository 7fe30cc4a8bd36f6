"""A lane: the images that can share a forward, of one model and one latent shape."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from server.engine.compiled import CompiledPlan, compile_plan
from server.engine.pool import Pool

if TYPE_CHECKING:
    from samplers import Plan
    from server.models.hosted import HostedModel

PLANS_KEPT = 256


class Lane:
    """Model, states and compiled plans of one lane."""

    def __init__(self, model: HostedModel, shape: tuple[int, int, int]) -> None:
        self.model = model
        self.shape = shape
        self.pool = Pool(shape, model.device)
        # Keyed by identity and holding the plan, so that an identity is never used again.
        self._plans: OrderedDict[tuple[int, int], tuple[Plan, CompiledPlan]] = OrderedDict()

    def compiled(self, plan: Plan) -> CompiledPlan:
        """The plan on this lane's device, kept for the next image that shares it."""
        key = id(plan), self.pool.slots
        if key not in self._plans:
            made = compile_plan(plan, self.model.facts, self.pool.slots, self.model.device)
            self._plans[key] = plan, made
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key][1]
