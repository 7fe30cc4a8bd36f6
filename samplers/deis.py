"""DEIS: exponential integrators that interpolate the noise prediction eps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.linear_multistep import Line, combined
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler
from samplers.step_order import LOWER_ORDER, LowerOrder, step_order

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class DEIS(Sampler, frozen=True):
    """Diffusion exponential integrator sampler (Zhang and Chen, arXiv 2204.13902) in log rho.

    The last values of eps are interpolated by a polynomial in log rho, rho = sigma / alpha, which
    is integrated over rho exactly, as in diffusers' ``DEISMultistepScheduler`` (solver_type
    logrho). The paper's own variants fit the polynomial in other variables: tAB-DEIS in the time
    t, rhoAB-DEIS in rho.

    Order 1 (DDIM) to 3, one evaluation a step. History: up to two values of eps. Orders 2 and 3
    are good from 10 steps without guidance; at high guidance scales ``dpm_solver_pp``, which
    interpolates the denoised prediction, is more stable. The last step to the clean picture is of
    first order.
    """

    summary: ClassVar[str] = (
        "Multistep in the noise prediction, fitted in log rho; good with guidance, from 8 steps."
    )
    source: ClassVar[str] = (
        "Zhang and Chen, arXiv 2204.13902, equations 11 to 15, fitted in log rho."
    )
    name: Literal["deis"] = "deis"
    order: Literal[1, 2, 3] = Field(
        default=2, description="Number of noise predictions that a step uses."
    )
    lower_order_final: LowerOrder = Field(default=True, description=LOWER_ORDER)

    @property
    @override
    def convergence_order(self) -> int:
        return self.order

    @override
    def plan(self, grid: Grid) -> Plan:
        # eps on flow matching too, not the velocity: the method is the fit in log(sigma / alpha).
        line = Line.of_noise(grid)
        slots = tuple(f"eps{k}" for k in range(1, self.order))
        columns = Columns("x", *slots)
        lam = grid.finite_half_log_snr
        tables: list[F64] = []
        for i in range(grid.steps):
            slopes = [line.slope(i, columns), *line.recalled(i, columns, slots[:i])]
            weights = _mean_weights(lam, i, step_order(grid, i, self.order, self.lower_order_final))
            x = line.step(i, columns, combined(weights, slopes))
            tables.append(columns.table(x=x, **line.kept(i + 1, x, slopes, slots)))
        return Plan.of_steps(grid, tables)


def _mean_weights(lam: F64, i: int, order: int) -> F64:
    """Weights of eps at points i, i - 1, ... in its mean over the next step in sigma / alpha.

    Let z go from 0 to 1 through the step, evenly in log SNR, so that sigma / alpha falls as
    e^(-h z). The weights reproduce the means of the powers of z below ``order``.
    """
    if order == 1:
        return np.ones(1)
    h = lam[i + 1] - lam[i]
    fall = -np.expm1(-h)
    means = [1.0]
    for power in range(1, order):
        # Integration by parts, from the mean of the next lower power.
        means.append((power / h * means[-1] * fall - np.exp(-h)) / fall)
    nodes = (lam[i::-1][:order] - lam[i]) / h
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(means))
