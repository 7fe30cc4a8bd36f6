"""The two-evaluation stochastic DPM-Solver++, with one Brownian path for both evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.first_order import first_order
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64


class DPMSolverPPSDE(Sampler, frozen=True):
    """A noisy step to the middle in log SNR, then the whole step with the prediction made there.

    Commonly called "DPM++ SDE". Two evaluations a step (one in the last step to the clean
    picture), stochastic. The noise of the whole step contains that of its first half, as
    increments of one Brownian motion in sigma / alpha do. With ``eta`` 0 it equals
    ``dpm_solver_pp_singlestep`` of order 2.
    """

    summary: ClassVar[str] = "DPM++ SDE: fresh noise at both of a step's two evaluations."
    source: ClassVar[str] = "k-diffusion, sample_dpmpp_sde."
    name: Literal["dpm_solver_pp_sde"] = "dpm_solver_pp_sde"
    eta: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Fraction of fresh noise: 0 is deterministic, 1 is ancestral sampling.",
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 2

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else 2

    @property
    @override
    def stochastic(self) -> bool:
        return self.eta > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "base", "drawn")
        x, base, drawn = columns["x"], columns["base"], columns["drawn"]
        D, noise = columns.denoised, columns.noise
        kept_noise = noise if self.stochastic else 0 * noise
        lam = grid.finite_half_log_snr
        tables: list[F64] = []
        points: list[tuple[float, float, float]] = []
        step: list[int] = []
        for i in range(grid.steps):
            here = float(grid.t[i]), float(grid.alpha[i]), float(grid.sigma[i])
            points.append(here)
            step.append(i)
            if grid.sigma[i + 1] == 0:
                tables.append(columns.table(x=first_order(grid, i, x, D)))
                continue
            end = float(grid.alpha[i + 1]), float(grid.sigma[i + 1])
            t = grid.schedule.time_of_half_log_snr(np.array((lam[i] + lam[i + 1]) / 2))
            level = grid.schedule.level(t)
            middle = float(level[0]), float(level[1])
            half, fresh = self._move(x, D, here[1:], middle)
            tables.append(columns.table(x=half + fresh * noise, base=x, drawn=kept_noise))
            points.append((float(t), *middle))
            step.append(i)
            whole, fresh = self._move(base, D, here[1:], end)
            shared = _shared(here[1:], middle, end)
            path = np.sqrt(shared) * drawn + np.sqrt(1 - shared) * noise
            tables.append(columns.table(x=whole + fresh * path))
        points.append((float(grid.t[-1]), float(grid.alpha[-1]), float(grid.sigma[-1])))
        told, alpha, sigma = np.array(points).T
        return Plan(told, alpha, sigma, np.stack(tables), tuple(step), grid.start_scale)

    def _move(
        self, x: F64, D: F64, start: tuple[float, float], end: tuple[float, float]
    ) -> tuple[F64, float]:
        """The state at another level without its fresh noise, and the deviation of that noise."""
        (alpha, sigma), (alpha_to, sigma_to) = start, end
        shrink = alpha * sigma_to / (alpha_to * sigma)
        fresh = self.eta * sigma_to * np.sqrt(max(1 - shrink**2, 0))
        kept = np.sqrt(sigma_to**2 - fresh**2)
        return kept / sigma * x + (alpha_to - alpha * kept / sigma) * D, float(fresh)


def _shared(
    start: tuple[float, float], middle: tuple[float, float], end: tuple[float, float]
) -> float:
    """Fraction of a step's noise variance that belongs to its first half; 1 from pure noise."""
    if start[0] == 0:
        return 1.0
    first, half, last = (sigma / alpha for alpha, sigma in (start, middle, end))
    return (first - half) / (first - last)
