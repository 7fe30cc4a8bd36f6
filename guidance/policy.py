"""What a guidance policy is: where the second prediction of a stage comes from."""

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
    """What stands for the rule's branches, ``[rows, B, C, h, w]``, and the memory to keep."""

    others: Tensor
    memory: Tensor


class Policy(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A policy's parameters, and its answers.

    Before a run it says at which stages the rule's branches are evaluated, and at which of the
    others they are estimated; at the rest the row goes on with the prompt's prediction alone. A
    policy that ``adapts`` looks at every stage that was evaluated and may end guidance for good,
    which frees the row for others at once. A policy that ``estimates`` keeps a memory and fills in
    the branches from it, however many the rule has, unless ``most_branches`` says otherwise.
    """

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    skips: ClassVar[bool] = True
    """Whether it may leave the branches out at some stage. One that does not is all that a rule
    without branches, and weighed particles, go with."""
    adapts: ClassVar[bool] = False
    """Whether ``settled`` is asked after each stage whose branches were evaluated."""
    estimates: ClassVar[bool] = False
    """Whether ``fill`` is called at each stage that is evaluated or estimated."""
    fitted: ClassVar[int] = 0
    """Coefficients, for each stage and branch, that must have been fitted to the model and the run
    beforehand."""
    fitted_by: ClassVar[str | None] = None
    """Command of `weft` that fits them and whose files they are found in. ``linear-ag`` is that of
    :mod:`guidance.linear_fit`. None for policies that need none; one that does, and is fitted by
    no command, cannot be served."""
    embeds: ClassVar[bool] = False
    """Whether the rule's scale is told to the network, which then guides by itself."""
    without_reference: ClassVar[str | None] = None
    """Parameters, as JSON, with which it needs no reference, if there are such."""
    name: str

    @abstractmethod
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the rule's branches are evaluated, ``[stages]``.

        Args:
            noise_ratio: sigma / alpha at each stage, inf at pure noise, ``[stages]``.
            progress: share of the steps done before each stage, in [0, 1), ``[stages]``.
        """

    def estimated(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages the branches are estimated: of a policy that does, all others.

        Args:
            noise_ratio: as for :meth:`evaluates`.
            progress: as for :meth:`evaluates`.
        """
        return ~self.evaluates(noise_ratio, progress) & self.estimates

    def refuses(self, rule: Rule) -> str | None:
        """Why it cannot serve a rule, as a clause; None where it can.

        Args:
            rule: with its parameters.
        """
        if self.skips and not rule.combines:
            return f"the rule {rule.name!r} makes one prediction only; leave the policy out"
        if self.embeds and not rule.plain_cfg:
            return f"the network applies 'cfg' itself, so it is incompatible with {rule.name!r}"
        most, branches = self.most_branches, len(rule.branches)
        if most is not None and branches > most:
            return (
                f"with these parameters it supports at most {most} second prediction, and the "
                f"rule {rule.name!r} has {branches}"
            )
        return None

    def acts(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """At which stages there is guidance at all, ``[stages]``.

        A policy of which that is no stage of a run leaves the run unguided.

        Args:
            noise_ratio: as for :meth:`evaluates`.
            progress: as for :meth:`evaluates`.
        """
        known = self.evaluates(noise_ratio, progress) | self.estimated(noise_ratio, progress)
        return known | self.embeds

    @property
    def fit_period(self) -> int:
        """Steps from one evaluation of the branches to the next, which coefficients depend on."""
        return 1

    @property
    def most_branches(self) -> int | None:
        """Branches of a rule that it can serve at these parameters; None is any number."""
        return None

    def memory_slots(self, branches: int) -> int:
        """Latent-sized slots that a row keeps for ``fill``; zero at first.

        Args:
            branches: of the row's rule, at least 1.
        """
        del branches
        return 0

    @property
    def wants_reference(self) -> bool:
        """Whether slot 0 of the memory is to hold the latent of the picture the run starts from."""
        return False

    def constants(
        self, stages: int, branches: int, coefficients: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Numbers of each stage that ``fill`` is given, ``[stages, n]``.

        Args:
            stages: of the run.
            branches: of the rule, at least 1.
            coefficients: what was fitted for this run, ``[stages, branches * fitted]``, those of
                a branch side by side.

        Raises:
            ValueError: there are no coefficients and they are needed, or they are those of
                another run.
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
        """What ``fill`` and ``settled`` are given of their rows' settings.

        Args:
            settings: one a row; fields that are no numbers agree over the rows.
            like: ``[1, C, h, w]``, gives type, device and number of axes.
        """
        return stack(settings, like)

    @classmethod
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        """The branches of each row, and what to keep; pure, each row by itself.

        A policy that ``estimates`` has its own; this one passes on what was evaluated.

        Args:
            rows: stacked predictions; ``others`` are meaningful where they were evaluated.
            memory: what the policy kept, ``[rows, slots, C, h, w]``.
            parameters: what :meth:`parameters` gave, and ``constants`` ``[rows, n, 1, 1, 1]`` of
                this stage.
            evaluated: whether the branches were evaluated at this stage, ``[rows, 1, 1, 1]`` bool.
        """
        del parameters, evaluated
        return Filled(rows.others, memory)

    @classmethod
    def settled(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which rows need none of their branches from now on, bool ``[rows]``."""
        del parameters
        return rows.closes_step.new_zeros(len(rows.closes_step))


def steps_of(progress: NDArray[np.float64]) -> NDArray[np.int64]:
    """The step that each stage belongs to, from 0, ``[stages]``, of the share done before it."""
    return np.unique(progress, return_inverse=True)[1]
