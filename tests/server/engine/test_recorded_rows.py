"""Recorded forwards of rows that change something inside the network give the forwards' numbers.

They are recorded operation by operation, see ``operation_tape``, with some inputs, and replayed
with others: what ought to have been a tensor of the recording shows as a wrong number if it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from guidance.edits import (
    ApartFrom,
    BackboneScales,
    BlurredQueries,
    Edit,
    IdentityAttention,
    NormalizedAttention,
    SkippedBlocks,
    SkipScales,
)
from server.engine import graphs as graphs_module
from server.engine.cost_model import TickCost
from server.engine.graphs import Graphs
from server.models.adapters.adapter import RowAdapters, Weighted
from server.models.conditioning import StackedConditioning
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.unet_model import TEXT
from tests.server.engine.operation_tape import Operations, OperationTape
from tests.server.models.adapters.low_rank import adapter, changes

SIDE = 32
COST = TickCost({1: 1.0})
FEW, OFTEN = 2, 3


@pytest.fixture(autouse=True)
def as_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without gradients; and a recording is soon made, and kept though it saves no time here."""
    for name, value in (("PAYS", 1e9), ("FEW", FEW), ("OFTEN", OFTEN), ("TIMED", 1)):
        monkeypatch.setattr(graphs_module, name, value)
    with torch.inference_mode():
        yield


Given = tuple[Tensor, Tensor, RowInputs]


def given(model: HostedModel, rows: int, seed: int, **more: Any) -> Given:
    """What a forward of some rows is given."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *model.latent_shape(SIDE, SIDE), generator=generator)
    told = {TEXT: torch.randn(rows, 7, 128, generator=generator)}
    t = torch.full((rows,), 100.0 + seed)
    return x, t, RowInputs(StackedConditioning(told), **more)


def ink(model: HostedModel, rank: int = 4) -> Weighted:
    parts = {"unet": changes(model.modules()["unet"], rank, seed=rank, within="attn")}
    return Weighted(adapter("ink", parts), 0.7)


def recorded(graphs: Graphs, inputs: Given) -> None:
    """Run a forward often enough, and record it."""
    for _ in range(FEW):
        graphs.evaluate(*inputs, COST)
    assert graphs.wanted
    while graphs.wanted:
        graphs.record()


def assert_replayed(graphs: Graphs, tape: OperationTape, model: HostedModel, inputs: Given) -> None:
    """A recording is replayed, and gives the numbers of the forward itself."""
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
    # Each combination by its own recording.
    swapped = RowAdapters((ours.rows[2], (), (one,)))
    recorded(graphs, given(model, 3, 2, adapters=swapped))
    for adapters in (ours, swapped):
        assert_replayed(graphs, tape, model, given(model, 3, 3, adapters=adapters))
    assert len(tape.made) == 2


UP = "up_blocks.1.attentions.1.transformer_blocks.0"

Edits = tuple[Edit, ...]


def edits_of_all_kinds(sigma: float, strength: float, scale: float) -> list[Edits]:
    """Of 8 rows; not in the places, but in all else they differ by the numbers."""
    return [
        (),
        (IdentityAttention(("middle",)),),
        (BlurredQueries((UP,), sigma),),
        (SkippedBlocks((UP,)), NormalizedAttention(scale, 2.5, strength)),
        (SkipScales((strength, 1.0)),),
        (BackboneScales((1 + strength, 1.4), (strength, 0.2)),),
        (BlurredQueries((UP,), math.inf), BackboneScales((1.1, 1.2), (0.9, strength))),
        (NormalizedAttention(2 * scale, 1.5, 0.25),),
    ]


def against(rows: int, seed: int) -> StackedConditioning:
    generator = torch.Generator().manual_seed(100 + seed)
    return StackedConditioning({TEXT: torch.randn(rows, 7, 128, generator=generator)})


def test_rows_with_edits_of_all_kinds_but_one(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, edits = Graphs(model, tape), edits_of_all_kinds(0.8, 0.5, 3.0)
    recorded(graphs, given(model, 8, 0, edits=edits, against=against(8, 0)))
    others = edits_of_all_kinds(2.5, 0.7, 5.0)
    # Also with the same numbers in other rows.
    for seed, rows in enumerate((edits, others, edits[::-1])):
        inputs = given(model, 8, seed, edits=rows, against=against(8, seed))
        assert_replayed(graphs, tape, model, inputs)
    assert len(tape.made) == 1


def test_rows_that_move_apart_from_others_with_adapters(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, ours = Graphs(model, tape), RowAdapters(((ink(model),), (), ()))
    apart: Edit = ApartFrom((UP,), 0.9, 0.65, 0)
    edits: list[Edits] = [(), (apart, IdentityAttention((UP,))), ()]
    recorded(graphs, given(model, 3, 0, edits=edits, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 3, 1, edits=edits, adapters=ours))
    # Another row is another forward.
    graphs.evaluate(*given(model, 3, 1, edits=edits[::-1], adapters=ours), COST)
    moved: list[Edits] = [(), (), (apart, IdentityAttention((UP,)))]
    recorded(graphs, given(model, 3, 0, edits=moved, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 3, 1, edits=moved, adapters=ours))


def test_the_host_takes_no_part_in_a_forward_whose_inputs_are_in_tensors(
    model: HostedModel,
) -> None:
    edits = edits_of_all_kinds(0.8, 0.5, 3.0)
    ours = RowAdapters(((ink(model),), *[()] * 7))
    x, t, inputs = given(model, 8, 0, edits=edits, against=against(8, 0), adapters=ours)
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


def test_a_combination_is_recorded_in_a_quiet_moment_once_it_has_run_a_few_times(
    model: HostedModel,
) -> None:
    graphs, ours = Graphs(model, OperationTape()), RowAdapters(((ink(model),),))
    for _ in range(FEW - 1):
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
    for _ in range(OFTEN):
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


def test_a_recording_goes_with_stacks_that_had_no_room(model: HostedModel) -> None:
    tape = OperationTape()
    graphs, ours = Graphs(model, tape), RowAdapters(((ink(model),),))
    recorded(graphs, given(model, 1, 0, adapters=ours))
    network: Any = model
    network._adapted["unet"]._plans.shrink(0)
    out = graphs.evaluate(*given(model, 1, 1, adapters=ours), COST)
    assert tape.made[0].released
    torch.testing.assert_close(out, model.evaluate(*given(model, 1, 1, adapters=ours)))
    recorded(graphs, given(model, 1, 0, adapters=ours))
    assert_replayed(graphs, tape, model, given(model, 1, 2, adapters=ours))


def test_of_too_many_recordings_the_one_that_ran_least_lately_goes(
    model: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 2)
    tape = OperationTape()
    graphs, one, other = Graphs(model, tape), *(RowAdapters(((ink(model, n),),)) for n in (2, 3))
    recorded(graphs, given(model, 1, 0))
    recorded(graphs, given(model, 1, 0, adapters=one))
    assert_replayed(graphs, tape, model, given(model, 1, 1))
    recorded(graphs, given(model, 1, 0, adapters=other))
    assert [made.released for made in tape.made] == [False, True, False]
