"""Several descents in sequence, with fresh noise that raises the state between them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from samplers.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from samplers.grid import Grid
    from samplers.levels import F64


def in_turn(grids: Sequence[Grid], solve: Callable[[Grid], Plan], noise_scale: float = 1.0) -> Plan:
    """One plan of several descents, each starting at or above the level that the last one reached.

    A solver with history starts afresh in each descent, and the steps of all descents count.

    Args:
        grids: grids of the descents.
        solve: makes the plan of one descent.
        noise_scale: factor on the standard deviation of the noise added between descents.
    """
    plans = [solve(grid) for grid in grids]
    tables = [
        _then_noised(plan.tables, end, start, noise_scale)
        for plan, (end, start) in zip(plans, pairwise(grids), strict=False)
    ]
    first = np.cumsum([0, *(plan.steps for plan in plans)]).tolist()
    t, alpha, sigma = (
        np.concatenate(
            [*(getattr(plan, name)[:-1] for plan in plans), getattr(plans[-1], name)[-1:]]
        )
        for name in ("t", "alpha", "sigma")
    )
    return Plan(
        t,
        alpha,
        sigma,
        np.concatenate([*tables, plans[-1].tables]),
        tuple(n + k for n, plan in zip(first, plans, strict=False) for k in plan.step),
        plans[0].start_scale,
    )


def _then_noised(tables: F64, descent: Grid, following: Grid, noise_scale: float) -> F64:
    """The tables of a descent whose last stage also goes up to the start of the next descent."""
    decay = following.alpha[0] / descent.alpha[-1]
    variance = following.sigma[0] ** 2 - (decay * descent.sigma[-1]) ** 2
    climbing = tables.copy()
    climbing[-1, 0] *= decay
    # A stage draws noise once, so the variances of its own noise and of the way up are added.
    fresh = noise_scale * np.sqrt(np.maximum(variance, 0))
    climbing[-1, 0, -2] = np.hypot(climbing[-1, 0, -2], fresh)
    return climbing
