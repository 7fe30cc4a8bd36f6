import torch

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
    pool.give_back(rows[0])
    again = pool.take(1, 1, 1)
    assert again == rows[0]
    assert (pool.columns[again] == 0).all()
    assert (pool.rule_memory[again] == 0).all()
    assert (pool.policy_memory[again] == 0).all()
