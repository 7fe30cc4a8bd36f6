"""The storage for the states of a lane grows without losing what it holds."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.state.pool import FIRST_CAPACITY, FIRST_SLOTS, Pool

SHAPE = (4, 2, 2)


def test_growing_in_rows_slots_and_memory_keeps_every_state():
    pool = Pool(SHAPE, torch.device("cpu"))
    first = pool.take(1, 0)
    pool.columns[first, : pool.slots] = 3.0
    more = [pool.take(2, 0) for _ in range(FIRST_CAPACITY)]
    assert len({first, *more}) == FIRST_CAPACITY + 1
    deeper = pool.take(FIRST_SLOTS + 2, 2, 3)
    assert pool.columns.shape[1] == FIRST_SLOTS + 4
    assert pool.rule_memory[deeper].shape == (2, *SHAPE)
    assert pool.policy_memory[deeper].shape == (3, *SHAPE)
    assert (pool.columns[first, :FIRST_SLOTS] == 3).all()
    assert (pool.columns[first, FIRST_SLOTS:] == 0).all()


def test_a_row_that_held_nan_is_clean_for_the_next_image():
    pool = Pool(SHAPE, torch.device("cpu"))
    rows = [pool.take(1, 1, 1) for _ in range(FIRST_CAPACITY)]
    pool.columns[rows[0]] = torch.nan
    pool.rule_memory[rows[0]] = torch.nan
    pool.policy_memory[rows[0]] = torch.nan
    pool.release(rows[0])
    again = pool.take(1, 1, 1)
    assert again == rows[0]
    assert (pool.columns[again] == 0).all()
    assert (pool.rule_memory[again] == 0).all()
    assert (pool.policy_memory[again] == 0).all()


class FullAfter(TorchDispatchMode):
    """A device whose memory has room for this many more tensors."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self._left = tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.cat):
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError("no room")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("tensors", range(3))
def test_a_pool_that_finds_no_memory_to_grow_in_stays_as_it_was(tensors):
    pool = Pool(SHAPE, torch.device("cpu"))
    rows = [pool.take(1, 1, 1) for _ in range(FIRST_CAPACITY)]
    pool.columns[rows[0]] = 3.0
    with pytest.raises(torch.OutOfMemoryError), FullAfter(tensors):
        pool.take(FIRST_SLOTS + 2, 2, 3)
    assert len(pool.columns) == len(pool.rule_memory) == len(pool.policy_memory) == FIRST_CAPACITY
    assert (pool.columns[rows[0]] == 3).all()
    pool.release(rows[1])
    assert pool.take(1, 1, 1) == rows[1]
    assert pool.take(1, 1, 1) >= FIRST_CAPACITY
    assert len(pool.columns) == len(pool.rule_memory) == len(pool.policy_memory)
