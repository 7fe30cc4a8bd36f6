"""The order of each step of a multistep sampler, which is lowered at both ends of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from samplers.grid import Grid

LowerOrder: TypeAlias = Literal[True, False, "below_15_steps", "always"]
"""When the last steps are of a lower order than requested; see :func:`step_order`."""

LOWER_ORDER = (
    "Lower the order of the last two steps: true, to 2, and to 1 where a step is long compared "
    "with the one before it; below_15_steps, only in runs shorter than that, like DPM-Solver's "
    "authors and diffusers; always, in every run, like UniPC's authors; false, never."
)
"""Description of a field of type :data:`LowerOrder`."""

FEW_STEPS = 15
"""Number of steps below which DPM-Solver's authors lower the order of the last steps."""

LAST = 2
"""Number of steps at the end whose order is lowered: the one to the clean picture, of order 1
anyway, and the one before it, which in many spacings is the only long one."""

MAX_STEP_RATIO = 2.5
"""Ratio of a step's length to the one before, in log SNR, above which a last step is of order 1.

A line through two predictions, extrapolated over r times their distance, weights them by
``1 + r / 2`` and ``-r / 2`` on average. The step before the one to the clean picture has an r of 1
to 2.2 in most spacings and of 3 to 6 in ``linspace`` and ``leading``, with up to 40 steps. On the
mixture of docs/mathematics.md, bounds from 2 to 3.5 differ by 1 %.
"""


def step_order(grid: Grid, i: int, order: int, lower: LowerOrder) -> int:
    """The number of predictions that the step from point i uses.

    It is at most the number known by then, and one in the step to the clean picture, where the
    weights of others would be infinite.

    Args:
        grid: the points of the run.
        i: index of the point where the step starts.
        order: maximum number of predictions.
        lower: whether the last steps use fewer. True: the last two use at most 2, and 1 where a
            step is more than :data:`MAX_STEP_RATIO` times as long as the one before it.
            "below_15_steps": in runs of fewer than 15 steps, at most the number of steps left, as
            DPM-Solver's authors do. "always": the same in every run, as UniPC's authors do. False:
            never.
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
            is_long = lam[i + 1] - lam[i] > MAX_STEP_RATIO * (lam[i] - lam[i - 1])
            return 1 if is_long else min(order, 2)
