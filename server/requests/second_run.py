"""Checks and resolves the second run of a request with `hires`."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager

from server.errors import InvalidRequest
from server.models.hosted import ModelFacts
from server.requests.checks.group import is_group
from server.requests.checks.limits import check_limits, check_size
from server.requests.schema import ResolvedRequest
from server.settings import Limits

__all__ = ["check_hires", "naming_hires", "second_run", "warned_again"]

FIELDS = ("width", "height", "steps", "strength")
"""That a second run has of its own."""


def check_hires(resolved: ResolvedRequest, *, has_picture: bool, has_reference: bool) -> None:
    """Refuse what a second run would have to do again, and cannot.

    Args:
        resolved: the request.
        has_picture: whether it starts from an image.
        has_reference: whether an image to move away from was sent.

    Raises:
        InvalidRequest: it starts from an image, or its images depend on others.
    """
    if resolved.hires is None:
        return
    if has_picture:
        raise InvalidRequest(
            "hires",
            "hires needs a first run from noise, so leave image out; to enlarge an image, send it "
            "with a larger width and height instead.",
        )
    if has_reference or is_group(resolved.guidance):
        raise InvalidRequest(
            "hires",
            "hires draws each image again by itself, so leave guidance.particles and "
            "guidance.negtome out.",
        )


def second_run(resolved: ResolvedRequest, facts: ModelFacts, limits: Limits) -> ResolvedRequest:
    """The second run as a request of its own, which starts from an image.

    Args:
        resolved: a request with `hires`.
        facts: of the model that will serve it.
        limits: the operator's.

    Raises:
        InvalidRequest: its size or its steps are not allowed.
    """
    hires = resolved.hires
    if hires is None:
        raise ValueError("the request has no hires")
    width, height = hires.size
    own = {"width": width, "height": height, "steps": hires.steps, "strength": hires.strength}
    second = resolved.model_copy(update={**own, "hires": None})
    with naming_hires():
        check_limits(second, limits)
        check_size(second, facts, limits)
    return second


@contextmanager
def naming_hires() -> Generator[None]:
    """Let refusals within the `with` block say that they are about the second run."""
    try:
        yield
    except InvalidRequest as refusal:
        own = refusal.field in FIELDS
        field = f"hires.{refusal.field}" if own else "hires"
        said = f"hires.{refusal.message}" if own else f"In the second run, {refusal.message}"
        refusal.field, refusal.message, refusal.args = field, said, (said,)
        raise


def warned_again(first: Collection[str], second: Sequence[str]) -> tuple[str, ...]:
    """What the second run alone is warned of.

    Args:
        first: warnings of the first run.
        second: of the second.
    """
    return tuple(f"In the second run, {warning}" for warning in second if warning not in first)
