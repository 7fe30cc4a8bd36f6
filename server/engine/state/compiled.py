"""A plan made ready for a device and a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from samplers import preconditioning

if TYPE_CHECKING:
    from torch import Tensor

    from samplers import Plan
    from server.models.hosted import ModelFacts


@dataclass(frozen=True, slots=True, eq=False)
class CompiledPlan:
    """Tables on the device, and the scalars of each stage as Python floats.

    Attributes:
        tables: float32 ``[stages, K, K + 3]`` or ``[stages, K, K + 3, C, h, w]``, K of the pool;
            per channel h and w are 1.
        t: what the network is told, a float a stage.
        alpha: signal scale at each stage and where the plan lands.
        sigma: noise scale, likewise.
        scale_in: of the network's input.
        skip: ``denoised = skip * x + out * raw``.
        out: see ``skip``.
        noisy: which stages draw noise.
        langevin: signal-to-noise ratio of each stage's Langevin move, 0 where it makes none.
        slots: K, of the pool that it was made for.
    """

    tables: Tensor
    t: list[float]
    alpha: list[float]
    sigma: list[float]
    scale_in: list[float]
    skip: list[float]
    out: list[float]
    noisy: tuple[bool, ...]
    langevin: tuple[float, ...]
    slots: int


def compile_plan(plan: Plan, facts: ModelFacts, slots: int, device: torch.device) -> CompiledPlan:
    """Pad the tables to ``slots`` state slots, and round them once, to float32."""
    K = plan.slots
    source = torch.from_numpy(plan.tables)
    tables = source.new_zeros(plan.evaluations, slots, slots + 3, *source.shape[3:])
    tables[:, :K, :K] = source[:, :, :K]
    tables[:, :K, slots:] = source[:, :, K:]
    scales = preconditioning(facts.prediction, plan.alpha[:-1], plan.sigma[:-1])
    return CompiledPlan(
        tables=tables.float().to(device),
        t=facts.schedule.conditioning(plan.t[:-1]).tolist(),
        alpha=plan.alpha.tolist(),
        sigma=plan.sigma.tolist(),
        scale_in=scales.scale_in.tolist(),
        skip=scales.skip.tolist(),
        out=scales.out.tolist(),
        noisy=plan.noisy,
        langevin=plan.langevin,
        slots=slots,
    )
