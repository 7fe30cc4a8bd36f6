"""Repeatable background load, as on a shared machine."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing import get_context
from random import Random
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

Begin: TypeAlias = "Callable[[int], None]"

MAX_SPELL_S = 3.0
NOTICED_S = 0.005
"""Seconds within which an idle process notices that the load restarts."""


@contextmanager
def busy(processes: int) -> Generator[Begin]:
    """Load the machine with processes that are alternately busy and idle for up to 3 seconds.

    Yields:
        A function that restarts the load with a seed: two runs that start with the same seed get
        the same load.
    """
    spawning = get_context("spawn")
    seed = spawning.Value("q", 0, lock=False)
    turn = spawning.Value("q", 0, lock=False)
    workers = [
        spawning.Process(target=_work, args=(number, seed, turn), daemon=True)
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()

    def begin(drawn_from: int) -> None:
        seed.value = drawn_from
        turn.value += 1

    try:
        yield begin
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(number: int, seed: Any, turn: Any) -> None:
    while True:
        now = turn.value
        random = Random(f"{number} of {seed.value}")
        while turn.value == now:
            until = perf_counter() + MAX_SPELL_S * random.random()
            while perf_counter() < until and turn.value == now:
                sum(range(10_000))
            until = perf_counter() + MAX_SPELL_S * random.random()
            while perf_counter() < until and turn.value == now:
                sleep(NOTICED_S)
