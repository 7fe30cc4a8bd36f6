"""Predictor-corrector sampling of the reverse SDE."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from samplers.ddim import ancestral_plan
from samplers.plan import Columns, Plan
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.grid import Grid


class ScoreSDEPC(Sampler, frozen=True):
    """Predictor and Langevin corrector (Song et al., arXiv 2011.13456, algorithms 1, 4 and 5).

    Each step goes to the next level by ancestral sampling, then makes ``corrector_steps`` Langevin
    moves along the score there, each with its own evaluation; the last step makes none.
    Stochastic.

    In high dimensions one move preserves the mean of a Gaussian and multiplies its variance by
    1 + 4 snr^4; repeated moves take the factor to 1 + snr^2. In a small number of dimensions d,
    moves have heavy tails: where x happens to lie close to alpha D their length is
    ``2 (snr sigma |z|)^2 / |x - alpha D|``, and the probability of a length above r falls only as
    r^-d. Its mean is therefore infinite in one dimension and its variance in two. Latents have
    thousands of dimensions.

    Departures from the source: norms are those of each image, not means over a batch. The
    predictor is ancestral sampling with the posterior's variance (their appendix F) on every
    schedule, as their reverse-diffusion predictor leaves too much noise at few steps. The
    corrector's step size lacks the factor 1 - beta of one trained step, which is 0.98 or more
    except at the noisiest levels.
    """

    summary: ClassVar[str] = (
        "Ancestral steps, each followed by Langevin corrector steps at the same noise level."
    )
    source: ClassVar[str] = "Song et al., arXiv 2011.13456, algorithms 1, 4 and 5, appendix F."
    name: Literal["score_sde_pc"] = "score_sde_pc"
    snr: float = Field(
        default=0.16,
        ge=0.01,
        le=1,
        description="Signal-to-noise ratio of a Langevin step; larger values move further.",
    )
    corrector_steps: int = Field(
        default=1,
        ge=1,
        le=4,
        description="Number of Langevin steps, each with one evaluation, after each step.",
    )

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 1 + self.corrector_steps

    @property
    @override
    def convergence_order(self) -> int:
        return 0

    @property
    @override
    def stochastic(self) -> bool:
        return True

    @override
    def plan(self, grid: Grid) -> Plan:
        predictor = ancestral_plan(grid, 1.0)
        columns = Columns("x")
        stay = columns.table(x=columns["x"])
        tables, points, step, langevin = [predictor.tables[0]], [0], [0], [0.0]
        for i in range(1, grid.steps):
            moves = self.corrector_steps
            tables += [stay] * moves + [predictor.tables[i]]
            points += [i] * (moves + 1)
            step += [i - 1] * moves + [i]
            langevin += [self.snr] * moves + [0.0]
        points.append(grid.steps)
        return Plan(
            grid.t[points],
            grid.alpha[points],
            grid.sigma[points],
            np.stack(tables),
            tuple(step),
            grid.start_scale,
            tuple(langevin),
        )
