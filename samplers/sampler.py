"""The interface that every sampler implements."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field
from typing_extensions import override

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.plan import Plan
    from samplers.statistics import Statistics


class Sampler(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A sampler's parameters and their compilation to a table.

    The declared properties are claims that one contract test verifies for every sampler.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    default_spacing: ClassVar[str] = "trailing"
    """Name of the spacing used when a request names none."""
    name: str

    @property
    @abstractmethod
    def convergence_order(self) -> int:
        """Order of the global error in the step size; 0 for a sampler that solves no equation.

        The first step of a multistep method, which is of order one, is disregarded: where a run
        starts at high noise, its error is below that of the other steps up to hundreds of steps.
        """

    @property
    def evaluations_per_step(self) -> int:
        """Number of evaluations of the model in a full step; the last step takes one."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether the run draws fresh noise after its start."""
        return False

    @property
    def uses_statistics(self) -> bool:
        """Whether ``plan`` needs statistics of the model; see :class:`FittedSampler`."""
        return False

    def steps_taken(self, steps: int) -> int:
        """Steps of a run over a grid of ``steps`` steps: more where a sampler restarts."""
        return steps

    def evaluations(self, steps: int) -> int:
        """Evaluations of the model in a run over a grid of ``steps`` steps."""
        return self.evaluations_per_step * (self.steps_taken(steps) - 1) + 1

    def evaluations_of_full_steps(self, steps: int) -> int:
        """``evaluations`` with a full last step, as AUTOMATIC1111 counts for prompt editing."""
        return self.evaluations_per_step * self.steps_taken(steps)

    @abstractmethod
    def plan(self, grid: Grid) -> Plan:
        """The table of a run over ``grid``.

        Raises:
            PlanError: the grid does not suit this sampler.
        """


class FittedSampler(Sampler, frozen=True):
    """A sampler whose tables are fitted to empirical statistics of the guided model."""

    statistics: Literal["exact", "nearest", "none"] = Field(
        default="exact",
        description=(
            "Which statistics of the model to use: exact, those for the request's guidance rule "
            "and scale; nearest, those for the nearest scale available; none, no statistics."
        ),
    )

    @property
    @override
    def uses_statistics(self) -> bool:
        return self.statistics != "none"

    @override
    @abstractmethod
    def plan(self, grid: Grid, statistics: Statistics | None = None) -> Plan:
        """The table of a run over ``grid``.

        Args:
            grid: the points of the run.
            statistics: statistics of the guided model, elementwise at the latent's shape or
                broadcastable to it; ``tables`` end in the statistics' shape. Not used where the
                field ``statistics`` is "none".

        Raises:
            PlanError: statistics are missing, or the grid does not suit them or this sampler.
        """
