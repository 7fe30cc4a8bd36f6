"""The collector of reference cycles during the start of a process."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.heap import collect_all, gc_frozen, gc_paused


class Cycle:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def many_cycles() -> list[weakref.ref[Cycle]]:
    """More than the collector lets pile up; those that nothing else holds are garbage."""
    return [weakref.ref(Cycle()) for _ in range(10 * gc.get_threshold()[0])]


@pytest.fixture(autouse=True)
def kept_as_before() -> Iterator[None]:
    """Otherwise later tests would wait for a collector that visits all imports."""
    kept = gc.get_freeze_count() > 0
    yield
    gc.unfreeze()
    if kept:
        gc.freeze()


def test_nothing_is_collected_while_collection_is_paused_and_everything_after() -> None:
    with gc_paused():
        cycles = many_cycles()
        assert all(cycle() for cycle in cycles)
    gc.collect()
    assert not any(cycle() for cycle in cycles)


def test_a_pause_within_a_pause_and_an_error_leave_the_collector_as_it_was() -> None:
    with gc_paused():
        with gc_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="while it starts"), gc_paused():
        raise ValueError("while it starts")
    assert gc.isenabled()


def test_the_collector_never_looks_at_what_is_kept_for_good() -> None:
    before = gc.get_freeze_count()
    with gc_frozen():
        kept = [Cycle() for _ in range(100)]
    assert gc.get_freeze_count() >= before + len(kept)
    assert not any(seen is kept[0] for seen in gc.get_objects())


def test_collecting_everything_frees_what_was_kept_for_good_and_keeps_the_rest() -> None:
    with gc_frozen():
        cycle, kept = weakref.ref(Cycle()), Cycle()
    gc.collect()
    assert cycle() is not None
    collect_all()
    assert cycle() is None
    assert not any(seen is kept for seen in gc.get_objects())


def test_collecting_everything_keeps_nothing_for_good_by_itself() -> None:
    gc.unfreeze()
    collect_all()
    assert gc.get_freeze_count() == 0
