"""Recorded forwards whose rows change something inside the network equal the forwards themselves.

They are recorded operation by operation (see ``operation_tape``) with some inputs and replayed with
others, so whatever should have been a tensor of the recording but is not gives a wrong number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from guidance.edits import ApartFrom, Edit, IdentityAttention
from server.engine import graphs as graphs_module
from server.engine.cost_model import TickCost
from server.engine.graphs import Graphs
from server.models.adapters.adapter import RowAdapters
from server.models.controls.control import Control
from server.models.hosted import HostedModel
from server.models.image_prompts.row_image_prompts import RowImagePrompts
from tests.server.engine.changed_rows import (
    Edits,
    ForwardInputs,
    depth_of,
    edits_of_all_kinds,
    given,
    ink,
    last_layer,
    shown,
    steered,
    told,
)
from tests.server.engine.operation_tape import Operations, OperationTape

COST = TickCost({1: 1.0})
IDLE_THRESHOLD, BUSY_THRESHOLD = 2, 3


@pytest.fixture(autouse=True)
def as_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run without gradients, record early, and keep recordings though they save no time here."""
    values = {
        "MAX_REPLAY_RATIO": 1e9,
        "IDLE_THRESHOLD": IDLE_THRESHOLD,
        "BUSY_THRESHOLD": BUSY_THRESHOLD,
        "TIMED": 1,
    }
    for name, value in values.items():
        monkeypatch.setattr(graphs_module, name, value)
    with torch.inference_mode():
        yield


def recorded(graphs: Graphs, inputs: ForwardInputs) -> None:
    """Run a forward often enough for it to be recorded, and record it."""
    for _ in range(IDLE_THRESHOLD):
        graphs.evaluate(*inputs, COST)
    assert graphs.wanted
    while graphs.wanted:
        graphs.record()


def assert_replayed(
    graphs: Graphs, tape: OperationTape, model: HostedModel, inputs: ForwardInputs
) -> None:
    """Check that a recording is replayed and gives the numbers of the forward itself."""
    calls = sum(one.calls for one in tape.made)
    ours = graphs.evaluate(*inputs, COST)
    assert sum(one.calls for one in tape.made) == calls + 1
    torch.testing.assert_close(ours, model.evaluate(*inputs), rtol=0, atol=0)


def test_rows_with_adapters(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, one, other = Graphs(model, tape), ink(model), ink(model, 8)
    ours = RowAdapters(((one,), (), (other, replace(one, weight=-0.3))))
    recorded(graphs, given(model, 3, 0, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 3, 1, adapters=ours))
    # Each combination has its own recording.
    swapped = RowAdapters((ours.rows[2], (), (one,)))
    recorded(graphs, given(model, 3, 2, adapters=swapped))
    for adapters in (ours, swapped):
        assert_replayed(graphs, tape, model, given(model, 3, 3, adapters=adapters))
    assert len(tape.made) == 2


def test_rows_with_edits_of_all_kinds_but_one(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, edits = Graphs(model, tape), edits_of_all_kinds(model, 0.8, 0.5, 3.0)
    recorded(graphs, given(model, 8, 0, edits=edits, against=told(model, 8, 0)))
    others = edits_of_all_kinds(model, 2.5, 0.7, 5.0)
    # The same numbers in other rows are replayed, too.
    for seed, rows in enumerate((edits, others, edits[::-1])):
        inputs = given(model, 8, seed, edits=rows, against=told(model, 8, seed))
        assert_replayed(graphs, tape, model, inputs)
    assert len(tape.made) == 1


def test_rows_that_move_apart_from_others_with_adapters(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, ours = Graphs(model, tape), RowAdapters(((ink(model),), (), ()))
    up = last_layer(model)
    apart: Edit = ApartFrom((up,), 0.9, 0.65, 0)
    edits: list[Edits] = [(), (apart, IdentityAttention((up,))), ()]
    recorded(graphs, given(model, 3, 0, edits=edits, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 3, 1, edits=edits, adapters=ours))
    # If another row has the edit, it is another forward.
    graphs.evaluate(*given(model, 3, 1, edits=edits[::-1], adapters=ours), COST)
    moved: list[Edits] = [(), (), (apart, IdentityAttention((up,)))]
    recorded(graphs, given(model, 3, 0, edits=moved, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 3, 1, edits=moved, adapters=ours))


@pytest.fixture(scope="module")
def depth(model: HostedModel) -> Control:
    return depth_of(model)


def test_rows_with_controlnets(model: HostedModel, depth: Control) -> None:
    tape = OperationTape()
    graphs, first = Graphs(model, tape), steered(model, depth, 0)
    recorded(graphs, given(model, 3, 0, controls=first))
    # Other pictures and scales, and on other rows.
    for seed, rows in enumerate(([0, 1, 2], [2, 0, 1])):
        ours = steered(model, depth, seed).of(rows)
        assert_replayed(graphs, tape, model, given(model, 3, seed, controls=ours))
    # With more rows it is another forward.
    calls = tape.made[0].calls
    graphs.evaluate(*given(model, 3, 0, controls=first.of([1, 1, 2])), COST)
    assert tape.made[0].calls == calls


def test_a_recording_goes_with_its_controlnet(model: HostedModel, depth: Control) -> None:
    tape = OperationTape()
    graphs, passing = Graphs(model, tape), replace(depth)
    recorded(graphs, given(model, 3, 0, controls=steered(model, passing, 0)))
    del passing
    graphs.evaluate(*given(model, 1, 0), COST)
    assert tape.made[0].released


def test_rows_with_image_prompts(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, rows = (
        Graphs(model, tape),
        [(shown(model, 1, 4),), (), (shown(model, 2, 4), shown(model, 3, 16))],
    )
    recorded(graphs, given(model, 3, 0, image_prompts=RowImagePrompts(tuple(rows))))
    others = [
        (),
        (shown(model, 4, 16), shown(model, 5, 4)),
        (replace(shown(model, 6, 4), region=None),),
    ]
    for seed, own in enumerate((rows, others)):
        inputs = given(model, 3, seed, image_prompts=RowImagePrompts(tuple(own)))
        assert_replayed(graphs, tape, model, inputs)


def test_the_host_takes_no_part_in_a_forward_whose_inputs_are_in_tensors(
    model: HostedModel, depth: Control
) -> None:
    edits = edits_of_all_kinds(model, 0.8, 0.5, 3.0)
    x, t, inputs = given(
        model,
        8,
        0,
        edits=edits,
        against=told(model, 8, 0),
        adapters=RowAdapters(((ink(model),), *[()] * 7)),
        controls=steered(model, depth, 0).padded(8, fixed=False),
        image_prompts=RowImagePrompts(((shown(model, 1, 4),),)).padded(8, fixed=False),
    )
    ready = model.in_tensors(inputs)
    model.evaluate(x, t, ready)
    seen = Operations()
    with seen:
        model.evaluate(x, t, ready)
    # What torch.tensor and torch.from_numpy make, and what .item() and .tolist() read.
    assert not {"lift_fresh", "_local_scalar_dense"} & seen.names
    with Operations() as before:
        model.evaluate(x, t, inputs)
    assert "lift_fresh" in before.names


def test_compiled_blocks_take_the_same_forwards_whether_or_not_inputs_are_in_tensors(
    model: HostedModel, depth: Control
) -> None:
    for more in ({}, {"controls": steered(model, depth, 0)}):
        assert model.in_tensors(given(model, 3, 0, **more)[2]).plain
    edits = [(), (IdentityAttention(("middle",)),), ()]
    for more in ({"edits": edits}, {"adapters": RowAdapters(((ink(model),), (), ()))}):
        assert not model.in_tensors(given(model, 3, 0, **more)[2]).plain


def test_a_combination_is_recorded_in_a_quiet_moment_once_it_has_run_a_few_times(
    model: HostedModel,
) -> None:
    graphs, ours = Graphs(model, OperationTape()), RowAdapters(((ink(model),),))
    for _ in range(IDLE_THRESHOLD - 1):
        graphs.evaluate(*given(model, 1, 0, adapters=ours), COST)
    assert not graphs.wanted
    graphs.evaluate(*given(model, 1, 0), COST)
    assert graphs.wanted
    graphs.record()
    assert not graphs.wanted
    graphs.evaluate(*given(model, 1, 0, adapters=ours), COST)
    assert graphs.wanted


@pytest.mark.parametrize("when", ["under way", "kept"])
def test_a_recording_goes_with_its_adapter(model: HostedModel, when: str) -> None:
    tape = OperationTape()
    graphs, passing = Graphs(model, tape), ink(model)
    ours = RowAdapters(((passing,),))
    graphs.evaluate(*given(model, 1, 0), COST)
    graphs.record()
    for _ in range(BUSY_THRESHOLD):
        graphs.evaluate(*given(model, 1, 0, adapters=ours), COST)
    if when == "under way":
        while len(tape.made) == 1:
            graphs.record_piece(10.0)
    if when == "kept":
        graphs.record()
        assert_replayed(graphs, tape, model, given(model, 1, 1, adapters=ours))
    del passing, ours
    assert_replayed(graphs, tape, model, given(model, 1, 1))
    assert not graphs.wanted
    assert not graphs.due(10.0)
    assert [one.released for one in tape.made] == [False, True][: len(tape.made)]


def test_memory_of_a_recording_whose_adapter_is_gone_before_it_is_made_is_given_back(
    model: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape, begun = OperationTape(), list[int]()
    monkeypatch.setattr(tape, "reset_pool", lambda: begun.append(len(tape.made)))
    graphs, passing = Graphs(model, tape), ink(model)
    ours = RowAdapters(((passing,),))
    for _ in range(BUSY_THRESHOLD):
        graphs.evaluate(*given(model, 1, 0, adapters=ours), COST)
    while not tape.made:
        graphs.record_piece(10.0)
    assert not begun
    del passing, ours
    graphs.evaluate(*given(model, 1, 1), COST)
    assert tape.made[0].released
    assert begun == [1]


def test_a_recording_goes_with_stacks_that_had_no_room(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, ours = Graphs(model, tape), RowAdapters(((ink(model),),))
    recorded(graphs, given(model, 1, 0, adapters=ours))
    network: Any = model
    network._changes._denoiser._plans.shrink(0)
    out = graphs.evaluate(*given(model, 1, 1, adapters=ours), COST)
    assert tape.made[0].released
    torch.testing.assert_close(out, model.evaluate(*given(model, 1, 1, adapters=ours)))
    recorded(graphs, given(model, 1, 0, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 1, 2, adapters=ours))


def test_of_too_many_recordings_the_one_that_ran_least_lately_goes(
    model: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 2)
    tape = OperationTape()
    graphs, one, other = Graphs(model, tape), *(RowAdapters(((ink(model, n),),)) for n in (2, 3))
    recorded(graphs, given(model, 1, 0))
    recorded(graphs, given(model, 1, 0, adapters=one))
    assert_replayed(graphs, tape, model, given(model, 1, 1))
    recorded(graphs, given(model, 1, 0, adapters=other))
    assert [made.released for made in tape.made] == [False, True, False]
