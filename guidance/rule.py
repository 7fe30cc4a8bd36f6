"""What a guidance rule is: one way to combine the predictions of a stage."""

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
    """The predictions of the rows that share a rule; each row may have its own parameters.

    Attributes:
        cond: denoised prediction for the prompt, ``[rows, C, h, w]``.
        others: denoised predictions of the rule's branches, in their order,
            ``[rows, B, C, h, w]``, B at least 1.
        x: the point that was evaluated, as ``cond``.
        alpha: signal scale there, ``[rows, 1, 1, 1]``.
        sigma: noise scale there, ``[rows, 1, 1, 1]``, above 0.
        progress: share of the sampler's steps done before this one, in [0, 1),
            ``[rows, 1, 1, 1]``.
        memory: what the rule kept from earlier steps, ``[rows, slots, C, h, w]``; zero at first.
        opens_step: whether this is the first evaluation of its step, the one before which a rule
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
        """The first branch's prediction, ``[rows, C, h, w]``: all there is for most rules."""
        return self.others[:, 0]


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
    combines: ClassVar[bool] = True
    """Whether there is anything to combine at some parameters; if not, no policy has work."""
    plain_cfg: ClassVar[bool] = False
    """Whether it is classifier-free guidance itself: ``Dc + (scale - 1) (Dc - Du)``.

    That is what a network may have been trained to do by itself (policies that embed), what
    particles correct, and what statistics of a guided model are of.
    """
    name: str

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The predictions beside the prompt's that can change the result at these parameters."""
        return (NEGATIVE,)

    def rewritten(self, read: Callable[[str], str]) -> Self:
        """The rule with its own texts as the network is to read them; most rules have none.

        Args:
            read: a text as it is to be read.
        """
        return self

    @classmethod
    def parameters(cls, settings: Sequence[Self], like: Tensor) -> Mapping[str, Tensor]:
        """What :meth:`combine` is given of its rows' settings.

        Args:
            settings: one a row; fields that are no numbers agree over the rows.
            like: ``[1, C, h, w]``, gives type, device and number of axes.
        """
        return stack(settings, like)

    @classmethod
    @abstractmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        """The guided prediction of each row.

        Args:
            rows: stacked predictions, as many branches in every row.
            parameters: this rule's numeric fields, each ``[rows, 1, 1, 1]``.
        """


class ScaledRule(Rule, frozen=True):
    """A rule that leads away from the negative prompt by a ``scale``, of which 1 does nothing."""

    scale: float = Field(default=4.0, ge=0, le=100, description="Strength; 1 is no guidance.")

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (NEGATIVE,)


def stack(settings: Sequence[BaseModel], like: Tensor) -> dict[str, Tensor]:
    """The numeric fields of equal models as tensors ``[rows, 1, 1, 1]`` on the device of ``like``.

    A field that is a tuple of n numbers gives ``[rows, n, 1, 1, 1]``.

    Args:
        settings: one frozen model a row, all of one class, their tuples of one length.
        like: ``[rows, C, h, w]``, gives type, device and number of axes.
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
    """Numbers as a tensor of the type of ``like``, on its device.

    Args:
        like: gives type and device.
        values: a number, or lists of numbers.
    """
    from torch import tensor

    # Not `new_tensor`, which waits for the device.
    return tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
