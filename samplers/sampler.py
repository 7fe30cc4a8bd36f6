"""What every sampler declares."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from samplers.grid import Grid
    from samplers.plan import Plan


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

    def steps_taken(self, steps: int) -> int:
        """Steps of a run over a grid of ``steps``: more where a sampler goes back up."""
        return steps

    def evaluations(self, steps: int) -> int:
        """Evaluations of the model in a run over a grid of ``steps``."""
        return self.evaluations_per_step * (self.steps_taken(steps) - 1) + 1

    @abstractmethod
    def plan(self, grid: Grid) -> Plan:
        """The table of a run over ``grid``.

        Raises:
            ValueError: the grid does not suit this sampler, with a sentence for the user.
        """
