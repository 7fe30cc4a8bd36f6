"""What rules and policies answer; a package may have written them, so its errors carry its name."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guidance import Policy
from server.engine.faults import is_out_of_memory, lost_device
from server.errors import RowFailed, failed_with

if TYPE_CHECKING:
    from collections.abc import Generator

    from guidance import Filled, Guided, Rule

__all__ = ["answering", "expect", "expect_flags"]


@contextmanager
def answering(part: Rule | Policy, device: torch.device) -> Generator[None]:
    """An error inside is the part's own, and the client is told its name.

    Args:
        part: whose methods are called inside.
        device: that its tensors are on.

    Raises:
        RowFailed: it raised an error, or what it returned does not fit. Errors of the device and
            of its memory are no part's own and stay as they are.
    """
    try:
        yield
    except Unfit as unfit:
        raise RowFailed(f"{_named(part)} {unfit}.") from None
    except Exception as error:
        if is_out_of_memory(error) or lost_device(error, device) is not None:
            raise
        raise RowFailed(failed_with(_named(part), error)) from error


def expect(answer: object, kind: type[Guided | Filled], *like: Tensor) -> None:
    """Check that an answer has the fields, the shapes and the types that it should.

    A tensor that is a little too small would be broadcast over the rows of other requests, and one
    of another type cannot be written between theirs: each tick would be halved until it is alone.

    Args:
        answer: of a part.
        kind: the named tuple that it should be.
        like: tensors of the shapes and types of its fields, in their order.

    Raises:
        Unfit: it is another.
    """
    if not isinstance(answer, kind):
        raise Unfit(f"returned {type(answer).__name__}, not {kind.__name__}")
    for name, found, wanted in zip(answer._fields, answer, like, strict=True):
        if found.shape != wanted.shape:
            raise Unfit(f"returned {name} of shape {list(found.shape)}, not {list(wanted.shape)}")
        if found.dtype != wanted.dtype:
            raise Unfit(f"returned {name} of type {found.dtype}, not {wanted.dtype}")


def expect_flags(answer: object, name: str, count: int) -> None:
    """Check that an answer is one bool of each row.

    Args:
        answer: of a part.
        name: of the method that gave it.
        count: of rows.

    Raises:
        Unfit: it is another.
    """
    if not isinstance(answer, Tensor):
        raise Unfit(f"returned {type(answer).__name__} from {name}, not Tensor")
    if answer.dtype != torch.bool or answer.shape != (count,):
        raise Unfit(
            f"returned {name} of type {answer.dtype} and shape {list(answer.shape)}, not "
            f"{torch.bool} and [{count}]"
        )


class Unfit(Exception):
    """An answer that does not fit; the message is the end of a sentence."""


def _named(part: Rule | Policy) -> str:
    return f"The {'policy' if isinstance(part, Policy) else 'rule'} {part.name!r}"
