"""The interface of guidance rules, each of which combines the predictions of a stage."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, Field
from typing_extensions import override

from guidance.branch import NEGATIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from torch import Tensor

    from guidance.branch import Branch


@dataclass(frozen=True, slots=True)
class Rows:
    """The predictions of rows that share a rule; each row may have its own parameters.

    Attributes:
        cond: denoised predictions for the prompt, ``[rows, C, h, w]``.
        others: denoised predictions of the rule's branches, in their order,
            ``[rows, B, C, h, w]``, B at least 1.
        x: points that were evaluated, of the shape of ``cond``.
        alpha: signal scale at these points, ``[rows, 1, 1, 1]``.
        sigma: noise scale at these points, ``[rows, 1, 1, 1]``, above 0.
        progress: fraction of the sampler's steps done before this one, in [0, 1),
            ``[rows, 1, 1, 1]``.
        memory: memory of the rule from earlier steps, ``[rows, slots, C, h, w]``; zero at first.
        opens_step: whether this is the first evaluation of its step, the only one at which a rule
            may move x, ``[rows, 1, 1, 1]`` bool.
        closes_step: whether this is the last evaluation of its step, ``[rows, 1, 1, 1]`` bool.
    """

    cond: Tensor
    others: Tensor
    x: Tensor
    alpha: Tensor
    sigma: Tensor
    progress: Tensor
    memory: Tensor
    opens_step: Tensor
    closes_step: Tensor

    @property
    def other(self) -> Tensor:
        """The first branch's prediction, ``[rows, C, h, w]``; most rules have only one branch."""
        return self.others[:, 0]


class Guided(NamedTuple):
    """The guided prediction, the point to step from, and the memory to keep."""

    denoised: Tensor
    x: Tensor
    memory: Tensor


class Rule(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A rule's parameters and its formula over stacked rows."""

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""
    memory_slots: ClassVar[int] = 0
    """Number of latent-sized slots that a row keeps between steps."""
    combines: ClassVar[bool] = True
    """Whether the rule combines predictions at some parameters; if not, policies have no effect."""
    plain_cfg: ClassVar[bool] = False
    """Whether the rule is plain classifier-free guidance: ``Dc + (scale - 1) (Dc - Du)``.

    Distilled networks embed this rule (policies with ``embeds``), particles correct it, and the
    statistics of guided models refer to it.
    """
    name: str

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The predictions, besides the prompt's, that can change the result at these parameters."""
        return (NEGATIVE,)

    def rewritten(self, read: Callable[[str], str]) -> Self:
        """The rule with its own texts converted to what the network reads; most rules have none.

        Args:
            read: converts a text.
        """
        return self

    @classmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """The parameters that :meth:`combine` gets from its rows' settings.

        Args:
            settings: settings of each row; fields that are not numbers are equal in all rows.
            like: tensor ``[1, C, h, w]`` whose dtype, device and number of axes are used.
        """
        return stack(settings, like)

    @classmethod
    @abstractmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        """The guided prediction of each row.

        Args:
            rows: stacked predictions, with the same number of branches in every row.
            parameters: numeric fields of the rule, each ``[rows, 1, 1, 1]``.
        """


class ScaledRule(Rule, frozen=True):
    """A rule that guides away from the negative prompt by a ``scale``; 1 is no guidance."""

    scale: float = Field(default=4.0, ge=0, le=100, description="Strength; 1 is no guidance.")

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (NEGATIVE,)


def stack(settings: Sequence[BaseModel], like: Tensor) -> dict[str, Tensor]:
    """Stack the numeric fields of models of one class as tensors ``[rows, 1, 1, 1]``.

    A field that is a tuple of n numbers gives ``[rows, n, 1, 1, 1]``.

    Args:
        settings: one frozen model per row, all of one class and with tuples of equal length.
        like: tensor ``[rows, C, h, w]`` whose dtype, device and number of axes are used.
    """
    ones = [1] * (like.ndim - 1)
    scalars = [field for field, value in settings[0] if _is_number(value)]
    values = [[getattr(one, field) for field in scalars] for one in settings]
    table = numbers_like(like, values).reshape(len(settings), len(scalars), *ones)
    stacked = dict(zip(scalars, table.unbind(1), strict=True))
    for field, value in settings[0]:
        if isinstance(value, tuple) and all(map(_is_number, value)):
            values = [getattr(one, field) for one in settings]
            stacked[field] = numbers_like(like, values).reshape(len(settings), len(value), *ones)
    return stacked


def numbers_like(like: Tensor, values: object) -> Tensor:
    """Numbers as a tensor with the dtype and device of ``like``.

    Args:
        like: tensor whose dtype and device are used.
        values: a number, or lists of numbers.
    """
    from torch import tensor

    # Not `new_tensor`, which synchronizes with the device.
    return tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
