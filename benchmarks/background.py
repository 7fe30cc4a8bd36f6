"""Background load, as on a shared machine."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing import get_context
from random import Random
from time import perf_counter, sleep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

LONGEST_SPELL_S = 3.0


@contextmanager
def busy(processes: int) -> Generator[None]:
    """Load the machine with so many processes, each busy and idle in turn for up to 3 seconds."""
    spawning = get_context("spawn")
    workers = [
        spawning.Process(target=_work, args=(seed,), daemon=True) for seed in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(seed: int) -> None:
    random = Random(seed)
    while True:
        until = perf_counter() + LONGEST_SPELL_S * random.random()
        while perf_counter() < until:
            sum(range(10_000))
        sleep(LONGEST_SPELL_S * random.random())
