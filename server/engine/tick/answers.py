"""Checks on what parts of guidance return; plug-ins may define them, so errors name them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from guidance import ClassifierGuidance, Policy, StepCache
from server.engine.faults import is_out_of_memory, lost_device
from server.errors import RowFailed, failed_with
from weft_plugins import FAILURES

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import TypeAlias

    from guidance import Filled, Guided, Rule

    Answerer: TypeAlias = Rule | Policy | ClassifierGuidance | StepCache

__all__ = ["answering", "expect", "expect_flags"]

NOUNS: Final = {Policy: "policy", ClassifierGuidance: "classifier term", StepCache: "step cache"}
"""What errors call the parts that are not rules."""


@contextmanager
def answering(part: Answerer, device: torch.device) -> Generator[None]:
    """Turn an error raised inside into one that names the part for the client.

    Args:
        part: part of guidance whose methods are called inside.
        device: device of its tensors.

    Raises:
        RowFailed: the part raised an error, or returned something that does not fit. A lost device
            and a lack of memory are not the part's fault, so those errors pass unchanged.
    """
    try:
        yield
    except InvalidAnswer as unfit:
        raise RowFailed(f"{_named(part)} {unfit}.") from None
    except FAILURES as error:
        if is_out_of_memory(error) or lost_device(error, device) is not None:
            raise
        raise RowFailed(failed_with(_named(part), error)) from error


def expect(answer: object, kind: type[Guided | Filled], *like: Tensor) -> None:
    """Check that an answer has the expected fields, shapes and dtypes.

    A tensor that is a little too small would be broadcast over the rows of other requests. One of
    another dtype cannot be written between theirs, and every tick would be split until the image is
    alone.

    Args:
        answer: what a rule or policy returned.
        kind: named tuple that it should be.
        like: tensors with the expected shapes and dtypes of its fields, in their order.

    Raises:
        InvalidAnswer: a field, a shape or a dtype differs.
    """
    if not isinstance(answer, kind):
        raise InvalidAnswer(f"returned {type(answer).__name__}, not {kind.__name__}")
    for name, found, wanted in zip(answer._fields, answer, like, strict=True):
        if found.shape != wanted.shape:
            raise InvalidAnswer(
                f"returned {name} of shape {list(found.shape)}, not {list(wanted.shape)}"
            )
        if found.dtype != wanted.dtype:
            raise InvalidAnswer(f"returned {name} of type {found.dtype}, not {wanted.dtype}")


def expect_flags(answer: object, name: str, count: int) -> None:
    """Check that an answer is one bool per row.

    Args:
        answer: what a rule or policy returned.
        name: name of the method that returned it.
        count: number of rows.

    Raises:
        InvalidAnswer: it is not.
    """
    if not isinstance(answer, Tensor):
        raise InvalidAnswer(f"returned {type(answer).__name__} from {name}, not Tensor")
    if answer.dtype != torch.bool or answer.shape != (count,):
        raise InvalidAnswer(
            f"returned {name} of type {answer.dtype} and shape {list(answer.shape)}, not "
            f"{torch.bool} and [{count}]"
        )


class InvalidAnswer(Exception):
    """An answer does not fit; the message is the end of a sentence."""


def _named(part: Answerer) -> str:
    noun = next((noun for kind, noun in NOUNS.items() if isinstance(part, kind)), "rule")
    return f"The {noun} {part.name!r}"
