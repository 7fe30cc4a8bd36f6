"""Run tasks on an engine directly, without the service."""

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


def started(model: HostedModel, row_budget: int | None, max_pending: int) -> Engine:
    """An engine of one model, ready for tasks.

    Raises:
        Exception: it could not start.
    """
    engine = Engine({model.facts.name: model}, row_budget=row_budget, max_pending=max_pending)
    engine.start()
    while not engine.ready:
        if engine.failure is not None:
            raise engine.failure
        sleep(POLL_S)
    return engine


def results_of(engine: Engine, tasks: list[ImageTask]) -> dict[int, ImageResult]:
    """All images of one submission by their place in it, in the order that they finish.

    Raises:
        Exception: an image failed.
    """
    ended = _Ended(len(tasks))
    engine.submit(tasks, ended)
    ended.all.wait()
    if ended.failure is not None:
        raise ended.failure
    return ended.results


class _Ended:
    """Hears of the images of one submission; ``all`` is set once there are no more to come."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.all = Event()
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
            self.all.set()
