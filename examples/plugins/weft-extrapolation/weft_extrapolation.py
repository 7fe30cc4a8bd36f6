"""DDIM, extrapolated over pairs of steps."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers import Columns, Grid, Plan, Sampler


class ExtrapolatedDDIM(Sampler, frozen=True):
    """Richardson's extrapolation of DDIM (Choi et al., arXiv 2504.01855, RX-Euler).

    Order 2, one evaluation a step. With ``lambda = sigma / alpha``, DDIM is Euler's method in
    ``x / alpha``. Its error over a pair of steps h1, h2 is ``c (h1^2 + h2^2)``, and the error of
    one step over both is ``c (h1 + h2)^2``. The combination in which the errors cancel is DDIM's
    second step plus ``(h1^2 + h2^2) / (2 h1)`` times the change of the noise prediction. A last
    step without a partner, and the first one from pure noise, are DDIM's.
    """

    summary: ClassVar[str] = "DDIM that cancels its leading error over pairs of steps."
    source: ClassVar[str] = "Choi et al., arXiv 2504.01855, RX-Euler."
    name: Literal["extrapolated_ddim"] = "extrapolated_ddim"
    strength: float = Field(
        default=1.0, ge=0, le=1, description="Share of the correction; 0 is DDIM."
    )

    @property
    @override
    def convergence_order(self) -> int:
        return 2 if self.strength == 1 else 1

    @override
    def plan(self, grid: Grid) -> Plan:
        # The previous step's noise prediction is stored as the signal that it implies at the new
        # point, `x - sigma eps`, so that it moves along where guidance or inpainting moves x.
        columns = Columns("x", "signal")
        x, D = columns["x"], columns.denoised
        with np.errstate(divide="ignore"):
            level = grid.sigma / grid.alpha
        first = int(np.isinf(level[0]))
        tables: list[np.ndarray] = []
        for i in range(grid.steps):
            eps = (x - grid.alpha[i] * D) / grid.sigma[i]
            landing = grid.alpha[i + 1] * D + grid.sigma[i + 1] * eps
            if i > first and (i - first) % 2 == 1:
                before = (x - columns["signal"]) / grid.sigma[i]
                h1, h2 = level[i] - level[i - 1], level[i + 1] - level[i]
                weight = self.strength * (h1**2 + h2**2) / (2 * h1)
                landing = landing + grid.alpha[i + 1] * weight * (eps - before)
            tables.append(columns.table(x=landing, signal=landing - grid.sigma[i + 1] * eps))
        return Plan.of_steps(grid, tables)
