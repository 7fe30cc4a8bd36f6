"""SA-Solver with a second evaluation at each corrected point."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.plan import Columns, Plan
from samplers.sa_solver import adams_weights, linear_part, weighted
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.levels import F64

PREDICTOR: Final = 3
CORRECTOR: Final = 4


class SASolverPECE(Sampler, frozen=True):
    """SA-Solver in its PECE form (Xue et al., arXiv 2309.05019, algorithm 1 and appendix).

    Predict, evaluate, correct, evaluate: a step ends with an evaluation at the predicted point,
    which corrects that point and keeps its noise; the next step begins with an evaluation at the
    corrected point. The predictor is of order 3 and the corrector of order 4; both orders are
    lowered in the last steps to the clean picture. Two evaluations a step, and one in the last.
    History: three predictions. Noise is drawn between 20 and 80 % of the schedule's time, or
    throughout. With ``tau`` 0 it is deterministic, and of fourth order until the error of the first
    steps shows.
    """

    summary: ClassVar[str] = "SA-Solver that evaluates each corrected point again; few steps."
    source: ClassVar[str] = "Xue et al., arXiv 2309.05019, equations 14 and 17; ComfyUI."
    name: Literal["sa_solver_pece"] = "sa_solver_pece"
    tau: float = Field(
        default=1.0,
        ge=0,
        le=1.6,
        description="Noise relative to the reverse diffusion: 0 is the ODE, 1 the usual SDE.",
    )
    noise: Literal["middle", "throughout"] = Field(
        default="middle",
        description="Which steps draw noise: those that end between 20 and 80 % of the time, or "
        "all.",
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 2

    @property
    @override
    def convergence_order(self) -> int:
        return 0 if self.stochastic else CORRECTOR

    @property
    @override
    def stochastic(self) -> bool:
        return self.tau > 0

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "D1", "D2", "D3")
        x, D = columns["x"], columns.denoised
        history = [columns["D1"], columns["D2"], columns["D3"]]
        clean = grid.sigma[-1] == 0
        tables: list[F64] = []
        points: list[int] = []
        step: list[int] = []
        for i in range(grid.steps):
            left = grid.steps - i - 1
            order = max(min(PREDICTOR, i + 1, left), 1) if clean else min(PREDICTOR, i + 1)
            tau = self._tau(grid, i)
            predictor = adams_weights(grid, i, i, order, tau)
            shrink, fresh = linear_part(grid, i, tau)
            landed = shrink * x + weighted(predictor, [D, *history]) + fresh * columns.noise
            tables.append(columns.table(x=landed, D1=D, D2=history[0], D3=history[1]))
            points.append(i)
            step.append(i)
            if left == 0:
                continue
            order = min(CORRECTOR, i + 2, left) if clean else min(CORRECTOR, i + 2)
            corrector = adams_weights(grid, i, i + 1, order, tau)
            # Replace the predictor's terms by the corrector's. Starting from x preserves what
            # guidance or inpainting changed in x.
            corrected = x - weighted(predictor, history) + weighted(corrector, [D, *history])
            kept = dict(zip(("D1", "D2", "D3"), history, strict=True))
            tables.append(columns.table(x=corrected, **kept))
            points.append(i + 1)
            step.append(i)
        points.append(grid.steps)
        return Plan(
            grid.t[points],
            grid.alpha[points],
            grid.sigma[points],
            np.stack(tables),
            tuple(step),
            grid.start_scale,
        )

    def _tau(self, grid: Grid, i: int) -> float:
        """The tau of the step from point i."""
        if grid.sigma[i + 1] == 0:
            return 0.0
        if self.noise == "throughout":
            return self.tau
        schedule = grid.schedule
        marks = schedule.half_log_snr(schedule.uniform(6, schedule.t_start, schedule.t_end))
        lands_in_the_middle = marks[1] <= grid.half_log_snr[i + 1] <= marks[4]
        return self.tau if lands_in_the_middle else 0.0
