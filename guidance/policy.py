"""The interface of guidance policies, which decide how a stage gets its second prediction."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from pydantic import BaseModel

from guidance.rule import stack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from numpy.typing import NDArray
    from torch import Tensor

    from guidance.rule import Rows, Rule


class Filled(NamedTuple):
    """The predictions of the rule's branches, ``[rows, B, C, h, w]``, and the memory to keep."""

    others: Tensor
    memory: Tensor


class Policy(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A policy's parameters and decisions.

    Before a run, a policy determines at which stages the rule's branches are evaluated, and at
    which of the other stages they are estimated. At the remaining stages, only the prompt's
    prediction is used. A policy that ``adapts`` checks every stage that was evaluated and may end
    guidance for the rest of the run, which frees the branches' rows at once. A policy that
    ``estimates`` keeps a memory and fills in the branches from it, for rules with any number of
    branches unless ``most_branches`` limits them.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    skips: ClassVar[bool] = True
    """Whether the policy may leave out the branches at some stage. Rules that never combine and
    weighted particles are only compatible with policies that do not."""
    adapts: ClassVar[bool] = False
    """Whether ``settled`` is called after each stage whose branches were evaluated."""
    estimates: ClassVar[bool] = False
    """Whether ``fill`` is called at each stage that is evaluated or estimated."""
    fitted: ClassVar[int] = 0
    """Number of coefficients, for each stage and branch, that must be fitted to the model and the
    run beforehand."""
    fitted_by: ClassVar[str | None] = None
    """Command of `weft` that fits the coefficients and writes the files they are read from.
    ``linear-ag`` is that of :mod:`guidance.linear_fit`. None for policies without coefficients; a
    policy that has coefficients but no command cannot be served."""
    embeds: ClassVar[bool] = False
    """Whether the network is conditioned on the rule's scale and guides by itself."""
    without_reference: ClassVar[str | None] = None
    """Parameters, as JSON, with which the policy needs no reference, if there are any."""
    name: str

    @abstractmethod
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the rule's branches are evaluated, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: fraction of the steps done before each stage, in [0, 1), ``[stages]``.
        """

    def estimated(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the branches are estimated: all others, if the policy ``estimates``.

        Args:
            noise_ratio: as for :meth:`evaluates`.
            progress: as for :meth:`evaluates`.
        """
        return ~self.evaluates(noise_ratio, progress) & self.estimates

    def refuses(self, rule: Rule) -> str | None:
        """The reason why the policy is incompatible with a rule, as a clause; None if it is not.

        Args:
            rule: the rule, with its parameters.
        """
        if self.skips and not rule.combines:
            return f"the rule {rule.name!r} makes one prediction only; leave the policy out"
        if self.embeds and not rule.plain_cfg:
            return f"the network applies 'cfg' itself, so it is incompatible with {rule.name!r}"
        most, branches = self.most_branches, len(rule.branches)
        if most is not None and branches > most:
            return (
                f"with these parameters it supports at most {most} second prediction, but the rule "
                f"{rule.name!r} has {branches}"
            )
        return None

    def acts(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages there is guidance at all, ``[stages]``.

        If that is no stage, the run is unguided.

        Args:
            noise_ratio: as for :meth:`evaluates`.
            progress: as for :meth:`evaluates`.
        """
        known = self.evaluates(noise_ratio, progress) | self.estimated(noise_ratio, progress)
        return known | self.embeds

    @property
    def fit_period(self) -> int:
        """Steps between evaluations of the branches, on which fitted coefficients depend."""
        return 1

    @property
    def most_branches(self) -> int | None:
        """Maximum number of branches of a rule that it supports; None for any number."""
        return None

    def memory_slots(self, branches: int) -> int:
        """Number of latent-sized slots that a row keeps for ``fill``; they are zero at first.

        Args:
            branches: number of branches of the row's rule, at least 1.
        """
        del branches
        return 0

    @property
    def wants_reference(self) -> bool:
        """Whether slot 0 of the memory must hold the latent of the run's start picture."""
        return False

    def constants(
        self, stages: int, branches: int, coefficients: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """The numbers that ``fill`` gets for each stage, ``[stages, n]``.

        Args:
            stages: number of stages of the run.
            branches: number of branches of the rule, at least 1.
            coefficients: coefficients fitted for this run, ``[stages, branches * fitted]``, with
                those of one branch side by side.

        Raises:
            ValueError: coefficients are needed and missing, or do not have the shape for this run.
        """
        if not self.fitted:
            return np.zeros((stages, 0))
        wanted = (stages, branches * self.fitted)
        if coefficients is None or coefficients.shape != wanted:
            found = None if coefficients is None else coefficients.shape
            raise ValueError(
                f"guidance.policy is {self.name!r}; it needs coefficients of shape {wanted}, "
                f"and was given {found}."
            )
        return coefficients

    @classmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """The parameters that ``fill`` and ``settled`` get from their rows' settings.

        Args:
            settings: settings of each row; fields that are not numbers are equal in all rows.
            like: tensor ``[1, C, h, w]`` whose dtype, device and number of axes are used.
        """
        return stack(settings, like)

    @classmethod
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        """The branches of each row and the memory to keep; pure, and independent per row.

        Policies that ``estimates`` override this method; by default it returns what was evaluated.

        Args:
            rows: stacked predictions; ``others`` are valid where they were evaluated.
            memory: memory of the policy, ``[rows, slots, C, h, w]``.
            parameters: result of :meth:`parameters`, and ``constants`` of this stage,
                ``[rows, n, 1, 1, 1]``.
            evaluated: whether the branches were evaluated at this stage, ``[rows, 1, 1, 1]`` bool.
        """
        del parameters, evaluated
        return Filled(rows.others, memory)

    @classmethod
    def settled(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which rows need none of their branches any more, bool ``[rows]``."""
        del parameters
        return rows.closes_step.new_zeros(len(rows.closes_step))


def steps_of(progress: NDArray[np.float64]) -> NDArray[np.int64]:
    """The step that each stage belongs to, from 0, ``[stages]``, given the progress before it."""
    return np.unique(progress, return_inverse=True)[1]
