"""What a guidance rule is: one way to combine the predictions of a stage."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The predictions of the rows that share a rule; each row may have its own parameters.

    Attributes:
        cond: denoised prediction for the prompt, ``[rows, C, h, w]``.
        other: denoised prediction of the second branch, same shape.
        x: the point that was evaluated, same shape.
        alpha: signal scale there, ``[rows, 1, 1, 1]``.
        sigma: noise scale there, ``[rows, 1, 1, 1]``, above 0.
        memory: what the rule kept from earlier steps, ``[rows, slots, C, h, w]``; zero at first.
        closes_step: whether this is the last evaluation of its step, ``[rows, 1, 1, 1]`` bool.
    """

    cond: Tensor
    other: Tensor
    x: Tensor
    alpha: Tensor
    sigma: Tensor
    memory: Tensor
    closes_step: Tensor


class Guided(NamedTuple):
    """The guided prediction, the point to step from, and the memory to keep."""

    denoised: Tensor
    x: Tensor
    memory: Tensor


class Rule(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A rule's parameters, and its mathematics over stacked rows."""

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    memory_slots: ClassVar[int] = 0
    """Latent-sized slots that a row keeps between steps."""
    branches: ClassVar[int] = 2
    """Predictions of a stage that the rule combines; with 1 no policy has anything to do."""
    name: str

    @property
    def needs_other(self) -> bool:
        """Whether the second prediction can change the result at these parameters."""
        return self.branches > 1

    @classmethod
    @abstractmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        """The guided prediction of each row.

        Args:
            rows: stacked predictions.
            parameters: this rule's numeric fields, each ``[rows, 1, 1, 1]``.
        """


def stack(settings: Sequence[BaseModel], like: Tensor) -> dict[str, Tensor]:
    """The numeric fields of equal models as tensors ``[rows, 1, 1, 1]`` on the device of ``like``.

    Args:
        settings: one frozen model a row, all of one class.
        like: ``[rows, C, h, w]``, gives type, device and number of axes.
    """
    numeric = [
        field
        for field, value in settings[0]
        if isinstance(value, float | int) and not isinstance(value, bool)
    ]
    values = [[getattr(one, field) for field in numeric] for one in settings]
    table = like.new_tensor(values).reshape(len(settings), len(numeric), *[1] * (like.ndim - 1))
    return dict(zip(numeric, table.unbind(1), strict=True))
