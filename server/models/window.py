"""What acts in a part of a run alone."""

from __future__ import annotations

__all__ = ["in_window"]


def in_window(start: float, end: float, stage: int, stages: int) -> bool:
    """Whether a whole stage lies between two shares of a run, as diffusers' pipelines reckon.

    Args:
        start: from 0 to 1.
        end: from 0 to 1.
        stage: from 0.
        stages: of the whole run.
    """
    return stage / stages >= start and (stage + 1) / stages <= end
