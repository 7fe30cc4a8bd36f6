"""A sampler's plan compiled for a device and a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from samplers import preconditioning
from samplers.prediction import as_velocity

if TYPE_CHECKING:
    from torch import Tensor

    from samplers import Plan
    from server.models.hosted import HostedModel


@dataclass(slots=True, eq=False, weakref_slot=True)
class CompiledPlan:
    """Tables for the device, and the scalars of each stage as Python floats.

    Attributes:
        plan: plan that it was made from.
        t: noise level as given to the network, a float per stage.
        alpha: signal scale at each stage and at the end of the plan.
        sigma: noise scale at each stage and at the end of the plan.
        scale_in: factor of x in the network's input.
        skip: ``denoised = skip * x + out * raw``.
        out: see ``skip``.
        as_velocity: input scale, skip and out of an equivalent network that predicts the velocity,
            which step caches see in place of this one.
        noisy: whether each stage draws noise.
        slots: number K of state slots of the pool that it was made for.
        device: device that the tables go to.
    """

    plan: Plan
    t: list[float]
    alpha: list[float]
    sigma: list[float]
    scale_in: list[float]
    skip: list[float]
    out: list[float]
    as_velocity: list[tuple[float, float, float]]
    noisy: tuple[bool, ...]
    slots: int
    device: torch.device
    _made: tuple[range, Tensor] | None = field(default=None, init=False)

    @property
    def langevin(self) -> tuple[float, ...]:
        """Signal-to-noise ratio of each stage's Langevin move; 0 without one."""
        return self.plan.langevin

    @property
    def detail(self) -> tuple[int, ...]:
        """Shape of one coefficient: ``()``, per channel ``(C, 1, 1)``, or ``(C, h, w)``."""
        return self.plan.tables.shape[3:]

    def table(self, stage: int) -> Tensor:
        """Coefficients of a stage on the device, float32 ``[K, K + 3, *detail]``, K of the pool.

        Of elementwise tables only one stage is on the device at a time, since all stages together
        may take hundreds of megabytes.
        """
        if self._made is None or stage not in self._made[0]:
            elementwise = self.detail[1:] not in ((), (1, 1))
            stages = range(stage, stage + 1) if elementwise else range(self.plan.evaluations)
            self._made = stages, self._tables(stages)
        stages, tables = self._made
        return tables[stage - stages.start]

    def _tables(self, stages: range) -> Tensor:
        """Tables padded to the pool's state slots, and rounded once, to float32."""
        own, K = self.plan.slots, self.slots
        source = torch.from_numpy(self.plan.tables[stages.start : stages.stop])
        tables = torch.zeros(
            len(stages), K, K + 3, *self.detail, pin_memory=self.device.type == "cuda"
        )
        tables[:, :own, :own] = source[:, :, :own]
        tables[:, :own, K:] = source[:, :, own:]
        return tables.to(self.device, non_blocking=True)


def compile_plan(plan: Plan, model: HostedModel, slots: int) -> CompiledPlan:
    """Compile a plan for states of ``slots`` slots, for a model and its device."""
    levels = plan.alpha[:-1], plan.sigma[:-1]
    scales = preconditioning(model.facts.prediction, *levels)
    velocity = as_velocity(model.facts.prediction, *levels)
    return CompiledPlan(
        plan=plan,
        t=model.network_time(plan.t[:-1]).tolist(),
        alpha=plan.alpha.tolist(),
        sigma=plan.sigma.tolist(),
        scale_in=scales.scale_in.tolist(),
        skip=scales.skip.tolist(),
        out=scales.out.tolist(),
        as_velocity=[*zip(*(one.tolist() for one in velocity), strict=True)],
        # Computed once: it is read at every stage, and takes a look at all tables.
        noisy=plan.noisy,
        slots=slots,
        device=model.device,
    )
