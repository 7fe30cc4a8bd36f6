"""A sampler compiled to a table, and the one function that applies a stage of it.

A stage is one evaluation of the guided model and the move of the state that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from samplers.langevin import corrected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from samplers.grid import Grid
    from samplers.levels import F64


class Columns:
    """Unit vectors over the columns of a stage's matrix.

    A sampler writes its step as arithmetic on them: ``0.5 * columns["x"] + 0.5 * columns.denoised``
    is the row of the matrix that averages x and the denoised prediction. Composed formulas (a
    corrector followed by a predictor) thus become one matrix.

    Args:
        slots: names of the state's slots; the first holds x.
        latent_dims: number of axes of a latent, for coefficients that differ over its elements; 0
            for scalar coefficients.
    """

    def __init__(self, *slots: str, latent_dims: int = 0) -> None:
        count = len(slots) + 3
        unit = np.eye(count).reshape(count, count, *([1] * latent_dims))
        self._slots = slots
        self._of_slot = dict(zip(slots, unit, strict=False))
        self.denoised: F64 = unit[-3]
        self.noise: F64 = unit[-2]
        self.one: F64 = unit[-1]

    def __getitem__(self, slot: str) -> F64:
        return self._of_slot[slot]

    def table(self, **slots: F64) -> F64:
        """The matrix whose rows are the new slots, ``[K, K + 3, ...]``; unnamed slots become 0.

        Raises:
            KeyError: a name is not that of a slot.
        """
        if unknown := slots.keys() - self._of_slot.keys():
            raise KeyError(f"{sorted(unknown)} are not slots; the slots are {list(self._slots)}.")
        shape = np.broadcast_shapes(self.one.shape, *(row.shape for row in slots.values()))
        table = np.zeros((len(self._slots), *shape))
        for place, name in enumerate(self._slots):
            if name in slots:
                table[place] = slots[name]
        return table


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The whole run of one image as data: where to evaluate, and how each stage moves the state.

    With state slots S, guided prediction D and fresh noise xi, stage i is
    ``S <- tables[i] @ [S_0 .. S_{K-1}, D, xi, 1]``, and slot 0 is the point of evaluation i + 1.

    Attributes:
        t: time that the denoiser is given at each stage, then the final time, ``[stages + 1]``.
        alpha: signal scale of slot 0 at these points, ``[stages + 1]``.
        sigma: noise scale of slot 0 at these points, ``[stages + 1]``.
        tables: float64 ``[stages, K, K + 3]``, or ``[stages, K, K + 3, C, h, w]`` elementwise.
        step: sampler step that each stage belongs to, from 0, ``[stages]``.
        start_scale: standard deviation of the start noise of a run without a start picture.
        langevin: signal-to-noise ratio of the Langevin move that a stage makes before its matrix,
            ``[stages]``; 0 where a stage is linear, as all are by default. The move uses up the
            stage's noise, so the matrix of such a stage must not use noise.

    Raises:
        ValueError: there are no stages, or shapes do not agree.
    """

    t: F64
    alpha: F64
    sigma: F64
    tables: F64
    step: tuple[int, ...]
    start_scale: float
    langevin: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.langevin:
            object.__setattr__(self, "langevin", (0.0,) * len(self.tables))
        stages, slots = (*self.tables.shape, 0, 0)[:2]
        if not stages:
            raise ValueError("a plan has at least one stage.")
        if self.tables.shape[2:3] != (slots + 3,):
            raise ValueError(
                f"a plan's tables have shape {self.tables.shape}; they are [stages, K, K + 3]."
            )
        for name, points in (("t", self.t), ("alpha", self.alpha), ("sigma", self.sigma)):
            if points.shape != (stages + 1,):
                raise ValueError(
                    f"a plan's {name} has shape {points.shape}; {stages} stages have "
                    f"{stages + 1} points."
                )
        for name, numbers in (("step", self.step), ("langevin", self.langevin)):
            if len(numbers) != stages:
                raise ValueError(
                    f"a plan's {name} has {len(numbers)} entries; it has {stages} stages."
                )

    @classmethod
    def of_steps(cls, grid: Grid, tables: Sequence[F64]) -> Plan:
        """A plan with one evaluation a step, at the points of the grid."""
        return cls(
            grid.t,
            grid.alpha,
            grid.sigma,
            np.stack(tables),
            tuple(range(grid.steps)),
            grid.start_scale,
        )

    @property
    def evaluations(self) -> int:
        """Number of stages, each of which is one evaluation of the guided model."""
        return len(self.tables)

    @property
    def steps(self) -> int:
        """Number of sampler steps; fewer than the evaluations where a step takes several."""
        return self.step[-1] + 1

    @property
    def noise_ratio(self) -> NDArray[np.float64]:
        """``sigma / alpha`` at each stage, inf at pure noise, ``[stages]``."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.sigma[:-1] / self.alpha[:-1], np.float64)

    @property
    def progress(self) -> NDArray[np.float64]:
        """Fraction of the steps done before each stage, in [0, 1), ``[stages]``."""
        return np.array(self.step, np.float64) / self.steps

    @property
    def weights(self) -> F64:
        """The weight of each evaluation's prediction in the result, ``[stages]``; not elementwise.

        The weights sum to 1. The sum of their absolute values is the largest factor by which an
        error common in size to all predictions can grow.
        """
        found = np.empty(self.evaluations)
        landing = np.eye(self.slots)[0]
        for stage in range(self.evaluations - 1, -1, -1):
            *moved, own = (landing @ self.tables[stage, :, : self.slots + 1]).tolist()
            found[stage], landing = own, np.array(moved)
        return found

    def opens_step(self, stage: int) -> bool:
        """Whether a stage's evaluation is the first one of its step.

        Guidance that moves x does so only there. The other evaluations of a step belong to the
        same move of the sampler: a second slope, an inner point, or a corrector at the level that
        was reached.
        """
        return stage == 0 or self.step[stage] != self.step[stage - 1]

    def closes_step(self, stage: int) -> bool:
        """Whether a stage's evaluation is the last one of its step."""
        return stage + 1 == self.evaluations or self.opens_step(stage + 1)

    @property
    def slots(self) -> int:
        """K, the number of slots of the state."""
        return self.tables.shape[1]

    @property
    def elementwise(self) -> bool:
        """Whether coefficients differ over the elements of a latent."""
        return self.tables.ndim > 3

    @property
    def noisy(self) -> tuple[bool, ...]:
        """Which stages use fresh noise, ``[stages]``."""
        column = self.tables[:, :, -2].reshape(self.evaluations, -1)
        return tuple(
            bool(drawn) or snr > 0
            for drawn, snr in zip(np.any(column != 0, axis=1), self.langevin, strict=True)
        )


def advance(columns: Tensor, tables: Tensor, langevin: Tensor | None = None) -> Tensor:
    """Apply one stage to each row: the only place where states move.

    Args:
        columns: ``[rows, K + 2, C, h, w]``: the state's K slots, the guided denoised prediction
            and fresh noise. Where a stage uses no noise, that column may hold any finite values.
        tables: ``[rows, K, K + 3]``, or ``[rows, K, K + 3, C, h, w]`` where elementwise.
        langevin: snr, alpha and sigma of the stages, ``[rows, 3]``, for the nonlinear move of
            those rows whose snr is not 0; None where all stages are linear.

    Returns:
        The new states ``[rows, K, C, h, w]``.
    """
    if langevin is not None:
        columns = corrected(columns, langevin)
    factors, constant = tables[:, :, :-1], tables[:, :, -1]
    if tables.ndim > 3:
        return (factors * columns[:, None]).sum(2) + constant
    flat = columns.reshape(*columns.shape[:2], -1)
    return constant[:, :, None].baddbmm(factors, flat).view(-1, tables.shape[1], *columns.shape[2:])


def integrate(
    plan: Plan,
    denoise: Callable[[Tensor, float], Tensor],
    x_start: Tensor,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Run a plan on a batch that shares it: the reference loop, for use without the server.

    Args:
        plan: result of ``Sampler.plan``.
        denoise: ``(x [rows, ...], t) -> denoised [rows, ...]``, with guidance if wanted. Where
            ``plan.opens_step`` it may move x in place, as CFG++ does; x is the state itself.
        x_start: start state ``[rows, ...]`` of any floating dtype at the plan's first level:
            ``plan.start_scale`` times unit noise for a run without a start picture.
        noise: maps a stage to unit noise ``[rows, ...]``; required where the plan uses noise.

    Returns:
        x at the end of the plan, ``[rows, ...]``, in the dtype of ``x_start``.

    Raises:
        ValueError: ``x_start`` has no elements or no floating dtype, or the plan uses noise and
            none is given.
    """
    if not x_start.is_floating_point():
        raise ValueError(f"x_start is of type {x_start.dtype}; a floating type is needed.")
    if x_start.ndim == 0 or x_start.numel() == 0:
        raise ValueError(
            f"x_start has shape {tuple(x_start.shape)}; it must be [rows, ...] with at least one "
            "row and one element."
        )
    if noise is None and any(plan.noisy):
        raise ValueError("noise is missing; this sampler is stochastic and draws noise each step.")
    rows, K = x_start.shape[0], plan.slots
    columns = x_start.new_zeros(rows, K + 2, *x_start.shape[1:])
    columns[:, 0] = x_start
    for stage, (t, table, noisy, snr) in enumerate(
        zip(plan.t[:-1], plan.tables, plan.noisy, plan.langevin, strict=True)
    ):
        columns[:, K] = denoise(columns[:, 0], float(t))
        if noisy and noise is not None:
            columns[:, K + 1] = noise(stage)
        per_row = x_start.new_tensor(table).expand(rows, *table.shape)
        langevin = None
        if snr > 0:
            scalars = x_start.new_tensor([snr, plan.alpha[stage], plan.sigma[stage]])
            langevin = scalars.expand(rows, 3)
        columns[:, :K] = advance(columns, per_row, langevin)
    return columns[:, 0].clone()
