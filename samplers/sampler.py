"""What every sampler declares."""

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
    """A sampler's parameters, and their compilation to a table.

    The class attributes are claims that one contract test holds every sampler to.
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
        """Order of the global error in the step, 0 for a sampler that solves no equation.

        Multistep methods make their first step with order one. It is not counted: where a run
        starts at high noise its error hides below the others' for hundreds of steps.
        """

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the model in a full step; the last step takes one."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether the run draws fresh noise on the way."""
        return False

    @property
    def uses_statistics(self) -> bool:
        """Whether ``plan`` is given statistics of the model, as a :class:`FittedSampler`'s is."""
        return False

    def steps_taken(self, steps: int) -> int:
        """Steps of a run over a grid of ``steps``: more where a sampler goes back up."""
        return steps

    def evaluations(self, steps: int) -> int:
        """Evaluations of the model in a run over a grid of ``steps``."""
        return self.evaluations_per_step * (self.steps_taken(steps) - 1) + 1

    def evaluations_of_full_steps(self, steps: int) -> int:
        """The same if the last step were a full one: AUTOMATIC1111 counts times of prompts so."""
        return self.evaluations_per_step * self.steps_taken(steps)

    @abstractmethod
    def plan(self, grid: Grid) -> Plan:
        """The table of a run over ``grid``.

        Raises:
            PlanError: the grid does not suit this sampler.
        """


class FittedSampler(Sampler, frozen=True):
    """A sampler whose tables are fitted to the guided model by its empirical statistics."""

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
            grid: the points.
            statistics: of the guided model at the latent's shape, elementwise or broadcastable to
                it; ``tables`` end in that shape. Not read where the field is "none".

        Raises:
            PlanError: they are missing, or the grid does not suit them or this sampler.
        """
