"""What acts in a part of a run alone: between two shares of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from server.models.window import in_window

if TYPE_CHECKING:
    from samplers import Plan

__all__ = ["check_window", "without_effect"]


class Windowed(Protocol):
    """What acts between two shares of a run."""

    @property
    def start(self) -> float:
        """The share after which it begins to act."""
        ...

    @property
    def end(self) -> float:
        """The share after which it no longer acts."""
        ...


W = TypeVar("W", bound=Windowed)


def check_window(acting: W) -> W:
    """The same; raises ValueError where it acts nowhere."""
    if acting.start >= acting.end:
        raise ValueError(f"start is {acting.start:g}; it must be less than end, {acting.end:g}")
    return acting


def without_effect(field: str, chosen: Sequence[Windowed], plan: Plan) -> tuple[str, ...]:
    """One sentence for each entry of a field that acts at no stage of a plan."""
    stages = plan.evaluations
    return tuple(
        f"{field}.{place} has no effect: no evaluation of this run lies within its start, "
        f"{one.start:g}, and end, {one.end:g}."
        for place, one in enumerate(chosen)
        if not any(in_window(one.start, one.end, stage, stages) for stage in range(stages))
    )
