"""Runs of tasks on an engine, without the service."""

from __future__ import annotations

from threading import Event
from time import sleep
from typing import TYPE_CHECKING

from server.engine.engine import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from server.engine.state.sequence import ImageResult
    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel

POLL_S = 0.05


def start_engine(model: HostedModel, row_budget: int | None, max_pending: int) -> Engine:
    """Start an engine with one model, and wait until it is ready.

    Raises:
        Exception: the engine could not start.
    """
    engine = Engine({model.facts.name: model}, row_budget=row_budget, max_pending=max_pending)
    engine.start()
    while not engine.ready:
        if engine.failure is not None:
            raise engine.failure
        sleep(POLL_S)
    return engine


def run_tasks(engine: Engine, tasks: list[ImageTask]) -> dict[int, ImageResult]:
    """Run tasks, and return the images by index in the order in which they finished.

    Raises:
        Exception: an image failed.
    """
    collector = _Collector(len(tasks))
    engine.submit(tasks, collector)
    collector.done.wait()
    if collector.failure is not None:
        raise collector.failure
    return collector.results


class _Collector:
    """Listener for the images of one submission; ``done`` is set once all have ended."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.done = Event()
        self.results: dict[int, ImageResult] = {}
        self.failure: Exception | None = None

    def started(self, index: int) -> None:
        del index

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        del index, step, steps, preview

    def finished(self, index: int, result: ImageResult) -> None:
        self.results[index] = result
        self._count()

    def failed(self, index: int, error: Exception) -> None:
        del index
        self.failure = error
        self._count()

    def _count(self) -> None:
        self._left -= 1
        if not self._left:
            self.done.set()
