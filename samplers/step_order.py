"""The order of a multistep sampler's step, lowered at the end where its history does not reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from samplers.grid import Grid

LowerOrder: TypeAlias = Literal[True, False, "below_15_steps", "always"]
"""When the last steps are of lower order than asked for, see :func:`step_order`."""

LOWER_ORDER = (
    "Lower the order of the last two steps: true, to 2, and to 1 where a step is long beside the"
    " one before it; below_15_steps, in shorter runs alone, as DPM-Solver's authors and diffusers"
    " do; always, as UniPC's authors do; false, never."
)
"""The description of a field of that type."""

FEW_STEPS = 15
"""Below as many, DPM-Solver's authors lower the order of the last steps."""

LAST = 2
"""Steps at the end that are lowered: the one to the clean picture, of order 1 anyway, and the one
before it, where spacings have their one long step."""

LONGEST = 2.5
"""Times the step before, in log SNR, above which one of the last steps is of order 1.

A line through two predictions that is followed over r times their distance weighs them by
``1 + r / 2`` and ``-r / 2`` on average. The step before the clean picture has an r of 1 to 2.2 over
most spacings and of 3 to 6 over ``linspace`` and ``leading``, with up to 40 steps. On the mixture
of docs/mathematics.md bounds from 2 to 3.5 differ by 1 %.
"""


def step_order(grid: Grid, i: int, order: int, lower: LowerOrder) -> int:
    """Predictions that the step from point i uses.

    No more than the run knows by then, and one in the step to the clean picture, where the weights
    of others are infinite.

    Args:
        grid: the points.
        i: index of the point that is left.
        order: the most predictions.
        lower: whether the last steps use fewer: true, the last two no more than 2, and 1 where a
            step is above :data:`LONGEST` times as long as the one before it; "below_15_steps", in
            such runs no more than there are steps left, as DPM-Solver's authors do; "always", that
            in every run, as UniPC's authors do; or false, never.
    """
    if grid.sigma[i + 1] == 0:
        return 1
    left = grid.steps - i
    order = min(order, i + 1)
    match lower:
        case "always":
            return min(order, left)
        case "below_15_steps":
            return min(order, left) if grid.steps < FEW_STEPS else order
        case False:
            return order
        case True:
            if left > LAST or order == 1:
                return order
            lam = grid.finite_half_log_snr
            is_long = lam[i + 1] - lam[i] > LONGEST * (lam[i] - lam[i - 1])
            return 1 if is_long else min(order, 2)
