"""What a guidance policy is: where the second prediction of a stage comes from."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.rule import Rows


class Policy(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A policy's parameters, and its two answers.

    Before a run it says at which stages the second branch is evaluated; where it is not, the row
    goes on with the prompt's prediction alone. A policy that ``adapts`` looks at every stage that
    was evaluated and may end guidance for good, which frees the row for others at once.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    adapts: ClassVar[bool] = False
    """Whether ``settled`` is asked after each stage with two predictions."""
    name: str

    @abstractmethod
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the second branch is evaluated, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: share of the steps done before each stage, in [0, 1), ``[stages]``.
        """

    @classmethod
    def settled(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which rows need no second prediction from now on, bool ``[rows]``."""
        del parameters
        return rows.closes_step.new_zeros(len(rows.closes_step))
