"""The order of a multistep sampler's step, lowered where its history does not reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from samplers.grid import Grid

LowerOrder: TypeAlias = Literal[True, False, "below_15_steps", "always"]
"""When the last steps are of lower order than asked for, see :func:`step_order`."""

LOWER_ORDER = (
    "Lower the order of the last steps: true, where they would extrapolate too far; below_15_steps,"
    " in runs of fewer steps, as DPM-Solver's authors and diffusers do; always; false, never."
)
"""The description of a field of that type."""

FEW_STEPS = 15
"""Below as many, DPM-Solver's authors lower the order of the last steps."""

LAST = 2
"""Steps at the end that may be lowered for what they cost: the one to the clean picture, of order
one anyway, and the one before it, where spacings have their one long step."""

FARTHEST = 4.0
"""Sum of the absolute weights of the predictions above which a step is made with a lower order.

A step of one prediction has 1. With order 2, that before the clean picture has 1.6 to 3.2 over most
spacings; over ``linspace`` and ``leading``, where it is 3 to 6 times as long as the step before it,
4 to 6, and with order 3 18 to 60. Even steps in log SNR have 2 and 3.4 to 4. On the mixture of
docs/mathematics.md every bound from 3.5 to 4.5 does as well.
"""


def step_order(
    grid: Grid, i: int, order: int, lower: LowerOrder, spread: Callable[[int], float]
) -> int:
    """Predictions that the step from point i uses.

    No more than the run knows by then, and one in the step to the clean picture, where the weights
    of others are infinite. A multistep formula is the integral of a polynomial through the last
    predictions, over a step that lies beyond all of them. The longer it is beside those before it,
    the larger are the weights, of alternating signs, and any deviation of the predictions from
    that polynomial is multiplied by their sum.

    Args:
        grid: the points.
        i: index of the point that is left.
        order: the most predictions.
        lower: whether the last steps are made with less: true, the last two where the weights' sum
            would be above :data:`FARTHEST`; "below_15_steps", in such runs no more than there are
            steps left, as DPM-Solver's authors do; "always", that in every run, as UniPC's do;
            or false, never.
        spread: the sum of the absolute weights of so many predictions in their mean over the step.
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
            if left > LAST:
                return order
            return next(p for p in range(order, 0, -1) if spread(p) <= FARTHEST)
