"""What acts in a part of a run alone: between two shares of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

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


def check_window(start: float, end: float) -> None:
    """Raises ValueError where nothing is between two shares of a run."""
    if start >= end:
        raise ValueError(f"start is {start:g}; it must be less than end, {end:g}")


def without_effect(field: str, chosen: Sequence[Windowed], plan: Plan) -> tuple[str, ...]:
    """One sentence for each entry of a field that acts at no stage of a plan."""
    stages = plan.evaluations
    return tuple(
        f"{field}.{place} has no effect: no evaluation of this run lies within its start, "
        f"{one.start:g}, and end, {one.end:g}."
        for place, one in enumerate(chosen)
        if not any(in_window(one.start, one.end, stage, stages) for stage in range(stages))
    )
