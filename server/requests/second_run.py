"""Checks and resolution of the second run of a request with `hires`."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager

from server.errors import InvalidRequest
from server.models.hosted import ModelFacts
from server.requests.checks.group import is_group
from server.requests.checks.limits import check_limits, check_size
from server.requests.schema import ResolvedRequest
from server.settings import Limits

__all__ = ["check_hires", "naming_hires", "new_warnings", "second_run"]

FIELDS = ("width", "height", "steps", "strength")
"""Fields that a second run has of its own."""


def check_hires(resolved: ResolvedRequest, *, has_picture: bool, has_reference: bool) -> None:
    """Refuse settings that a second run cannot repeat.

    Args:
        resolved: request.
        has_picture: whether it starts from an image.
        has_reference: whether an image to move away from was sent.

    Raises:
        InvalidRequest: the request starts from an image, or its images depend on others.
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
    """Return the second run as a separate request, which starts from an image.

    Args:
        resolved: request with `hires`.
        facts: facts of the model that will serve it.
        limits: limits set by the operator.

    Raises:
        InvalidRequest: the size or the steps of the second run are not allowed.
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
    """Rewrite refusals within the `with` block to refer to the second run."""
    try:
        yield
    except InvalidRequest as refusal:
        own = refusal.field in FIELDS
        field = f"hires.{refusal.field}" if own else "hires"
        said = f"hires.{refusal.message}" if own else f"In the second run, {refusal.message}"
        refusal.field, refusal.message, refusal.args = field, said, (said,)
        raise


def new_warnings(first: Collection[str], second: Sequence[str]) -> tuple[str, ...]:
    """Return the warnings that only the second run has.

    Args:
        first: warnings of the first run.
        second: warnings of the second run.
    """
    return tuple(f"In the second run, {warning}" for warning in second if warning not in first)
