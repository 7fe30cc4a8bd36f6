"""Windows of a run in which something acts."""

from __future__ import annotations

__all__ = ["in_window"]


def in_window(start: float, end: float, stage: int, stages: int) -> bool:
    """Whether a stage lies entirely within a window of the run, as in diffusers' pipelines.

    A stage is one evaluation of the guided prediction.

    Args:
        start: start of the window as a fraction of the run, from 0 to 1.
        end: end of the window as a fraction of the run, from 0 to 1.
        stage: index of the stage, from 0.
        stages: number of stages of the run.
    """
    return stage / stages >= start and (stage + 1) / stages <= end
