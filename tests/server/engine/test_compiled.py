"""Plans on the device: whole where they are small, a stage at a time where they are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from server.engine.cost_model import TickCost
from server.engine.state.compiled import compile_plan
from server.engine.state.lane import Lane
from tests.server.toy_model import Toy


def spread(plan, side):
    """The same coefficients, expanded to each element."""
    tables = plan.tables[..., None, None, None]
    return replace(plan, tables=np.broadcast_to(tables, (*plan.tables.shape, 4, side, side)).copy())


def test_an_elementwise_plan_gives_the_scalar_one_s_coefficients_at_every_stage(task):
    plan = task("dpm_solver_pp", steps=4).plan
    scalar = compile_plan(plan, Toy(), 5)
    elementwise = compile_plan(spread(plan, 2), Toy(), 5)
    assert (scalar.detail, elementwise.detail) == ((), (4, 2, 2))
    for stage in (0, 1, 3, 2):
        expected = scalar.table(stage)
        assert expected.shape == (5, 8)
        assert torch.equal(
            elementwise.table(stage), expected[..., None, None, None].expand(5, 8, 4, 2, 2)
        )


def test_of_an_elementwise_plan_one_stage_is_in_memory(task):
    """25 stages at 1024 x 1024 pixels would be 184 MB on the device."""
    compiled = compile_plan(spread(task(steps=25).plan, 16), Toy(), 4)
    tables = [compiled.table(stage) for stage in range(25)]
    assert {table.untyped_storage().nbytes() for table in tables} == {4 * 7 * 4 * 16 * 16 * 4}
    assert compiled.table(24) is not tables[0]
    assert compiled.table(24).data_ptr() == tables[24].data_ptr()


def test_images_of_one_plan_share_it_and_nobody_holds_it_after_them(task):
    lane, plan = Lane(Toy(), (4, 4, 4), TickCost({1: 1.0}), 8), task(steps=2).plan
    first, second = lane.compiled(plan), lane.compiled(plan)
    assert first is second
    del first, second
    assert not lane._compiled
