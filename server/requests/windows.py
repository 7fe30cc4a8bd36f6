"""Windows: parts of a run in which something acts, between two shares of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from server.models.window import in_window

if TYPE_CHECKING:
    from samplers import Plan

__all__ = ["check_window", "without_effect"]


class Windowed(Protocol):
    """Something that acts between two shares of a run."""

    @property
    def start(self) -> float:
        """Share of the run after which it begins to act."""
        ...

    @property
    def end(self) -> float:
        """Share of the run after which it no longer acts."""
        ...


W = TypeVar("W", bound=Windowed)


def check_window(acting: W) -> W:
    """Return the argument; raise ValueError if its window is empty."""
    if acting.start >= acting.end:
        raise ValueError(f"start is {acting.start:g}; it must be less than end, {acting.end:g}")
    return acting


def without_effect(field: str, chosen: Sequence[Windowed], plan: Plan) -> tuple[str, ...]:
    """Return one sentence for each entry of a field that acts at no stage of a plan."""
    stages = plan.evaluations
    return tuple(
        f"{field}.{place} has no effect: no evaluation of this run lies within its start, "
        f"{one.start:g}, and end, {one.end:g}."
        for place, one in enumerate(chosen)
        if not any(in_window(one.start, one.end, stage, stages) for stage in range(stages))
    )
