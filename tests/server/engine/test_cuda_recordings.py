"""CUDA graphs of forwards whose rows change something inside the network; skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
import torch

from embedded import MODEL_FOLDER
from guidance.edits import ApartFrom
from guidance.pag import PAG
from server.engine import graphs as graphs_module
from server.engine.autoencoder_calls import AutoencoderCalls
from server.engine.capture import CudaRecorder
from server.engine.cost_model import TickCost
from server.engine.decoder_stream import on_decoder_stream
from server.engine.engine import Engine
from server.engine.graphs import IDLE_THRESHOLD, Graphs
from server.engine.task import ImageTask
from server.models.adapters.adapter import RowAdapters
from server.models.hosted import HostedModel
from server.models.image_prompts.row_image_prompts import RowImagePrompts
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.memory import reclaim
from tests.server.engine.changed_rows import (
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

pytestmark = pytest.mark.cuda

Forward = Callable[[int], ForwardInputs]
"""The inputs of a forward, by seed."""


@pytest.fixture(scope="module")
def on_gpu() -> HostedModel:
    return load_model(MODEL_FOLDER, name="embedded", device="cuda", dtype="float16")


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def record(model: HostedModel, inputs: ForwardInputs) -> Graphs:
    """The recordings of a model, with one of this forward."""
    graphs = Graphs(model, CudaRecorder(model.device))
    for _ in range(IDLE_THRESHOLD):
        graphs.evaluate(*inputs, TickCost({1: 1.0}))
    while graphs.wanted:
        graphs.record()
    return graphs


def adapted(model: HostedModel) -> Forward:
    """Adapters of attention alone and of all layers with convolutions, beside a row without one."""
    rows = RowAdapters(((ink(model),), (), (ink(model, 8, within=""), ink(model, 4))))
    return lambda seed: given(model, 3, seed, adapters=rows)


def edited(number: int) -> Callable[[HostedModel], Forward]:
    def of(model: HostedModel) -> Forward:
        def forward(seed: int) -> ForwardInputs:
            edits = edits_of_all_kinds(model, 0.8 + seed, 0.5 + 0.1 * seed, 3.0 + seed)
            two = [edits[number], edits[0]]
            # Now each of these rows does what the other did.
            return given(
                model, 2, seed, edits=two[:: 1 - 2 * (seed % 2)], against=told(model, 2, seed)
            )

        return forward

    return of


def apart(model: HostedModel) -> Forward:
    edits = [(), (ApartFrom((last_layer(model),), 0.9, 0.65, 0),)]
    return lambda seed: given(model, 2, seed, edits=edits)


def controlled(model: HostedModel) -> Forward:
    depth = depth_of(model)
    return lambda seed: given(model, 3, seed, controls=steered(model, depth, seed))


def pictured(model: HostedModel) -> Forward:
    def forward(seed: int) -> ForwardInputs:
        rows = (shown(model, seed, 4),), (), (shown(model, 10 + seed, 16),)
        return given(model, 3, seed, image_prompts=RowImagePrompts(rows))

    return forward


def all_at_once(model: HostedModel) -> Forward:
    depth, rows = depth_of(model), RowAdapters(((ink(model),), *[()] * 7))

    def forward(seed: int) -> ForwardInputs:
        return given(
            model,
            8,
            seed,
            edits=edits_of_all_kinds(model, 0.8 + seed, 0.5, 3.0 + seed),
            against=told(model, 8, seed),
            adapters=rows,
            controls=steered(model, depth, seed).padded(8, fixed=False),
            image_prompts=RowImagePrompts(((shown(model, seed, 4),),)).padded(8, fixed=False),
        )

    return forward


KINDS: dict[str, Callable[[HostedModel], Forward]] = {
    "adapters": adapted,
    "identity": edited(1),
    "blur": edited(2),
    "skipped block, NAG": edited(3),
    "skip scales": edited(4),
    "FreeU": edited(5),
    "even blur, FreeU": edited(6),
    "apart": apart,
    "ControlNet": controlled,
    "image prompts": pictured,
    "all at once": all_at_once,
}


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_forwards_of_changed_rows_equal_those_they_were_made_of_to_the_bit(
    on_gpu: HostedModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kept however busy the machine is, since that affects how much time is saved.
    monkeypatch.setattr(graphs_module, "MAX_REPLAY_RATIO", 1e9)
    forward = KINDS[kind](on_gpu)
    graphs = record(on_gpu, forward(0))
    assert graphs.rows == [len(forward(0)[0])]
    [recording] = graphs._recorded.values()
    replayed = list[Any]()
    replay = recording.__call__

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        replayed.append(tensors)
        return replay(*tensors)

    monkeypatch.setattr(graphs, "_recorded", dict.fromkeys(graphs._recorded, counted))
    for seed in (0, 1, 2):
        inputs = forward(seed)
        ours = graphs.evaluate(*inputs, TickCost({1: 1.0}))
        assert torch.equal(ours, on_gpu.evaluate(*inputs))
    assert len(replayed) == 3
    recording.release()


@pytest.mark.usefixtures("without_gradients")
def test_a_recording_whose_adapter_is_gone_gives_its_memory_back(
    on_gpu: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_REPLAY_RATIO", 1e9)

    def reserved() -> int:
        reclaim(on_gpu.device)
        return torch.cuda.memory_reserved()

    def come_and_go() -> None:
        before = reserved()
        passing = ink(on_gpu)
        graphs = record(on_gpu, given(on_gpu, 8, 0, adapters=RowAdapters(((passing,),) * 8)))
        assert graphs.rows == [8]
        assert graphs.nbytes > 0
        assert torch.cuda.memory_reserved() > before
        del passing
        graphs.evaluate(*given(on_gpu, 8, 0), TickCost({1: 1.0}))
        assert (graphs.rows, graphs.nbytes) == ([], 0)

    # Once beforehand, since libraries keep memory for a stream.
    come_and_go()
    before = reserved()
    come_and_go()
    assert reserved() <= before


def changed_forms(engine: Engine) -> list[Any]:
    """The recorded forwards that are not plain."""
    preparation: Any = engine._idle_work._preparation
    recorded = list(preparation._graphs["embedded"]._recorded)
    return [shape.form for shape in recorded if shape.form.kind]


def test_a_deterministic_engine_replays_its_ticks_and_draws_the_same_bits(
    start: Any, on_gpu: HostedModel, task: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_REPLAY_RATIO", 1e9)
    images: list[ImageTask] = [task("unipc", steps=3 + seed, seed=seed) for seed in range(6)]
    plain = start(model=on_gpu, deterministic=True, cuda_graphs=False)
    expected = [run(plain, [one]).pixels()[0] for one in images]
    # Two engines must not run one model at once.
    plain.stop(0)
    engine = start(model=on_gpu, deterministic=True)
    run(engine, images)
    until = monotonic() + 60
    # Forwards of the default size have as many rows.
    while not engine.settled:
        assert monotonic() < until, engine.prepared(on_gpu)
        sleep(0.05)
    assert engine.prepared(on_gpu).recorded == (8,)
    launched = list[int]()
    evaluate = on_gpu.evaluate

    def counted(x: torch.Tensor, *more: Any) -> torch.Tensor:
        launched.append(len(x))
        return evaluate(x, *more)

    monkeypatch.setattr(on_gpu, "evaluate", counted)
    together = run(engine, images).pixels()
    assert launched == []
    assert all(np.array_equal(a, b) for a, b in zip(together, expected, strict=True))


def test_recorded_ticks_of_changed_rows_draw_the_images_of_other_ticks_to_the_bit(
    start: Any, on_gpu: HostedModel, task: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = (ink(on_gpu),)
    # Two rows each, one image after another, so that all forwards have as many rows.
    images: list[ImageTask] = [
        task(adapters=style, steps=2 * IDLE_THRESHOLD, seed=1),
        task(rule="none", settings=(PAG(),), steps=2 * IDLE_THRESHOLD, seed=2),
    ]
    plain = start(model=on_gpu, cuda_graphs=False)
    expected = [run(plain, [one]).pixels()[0] for one in images]
    # Two engines must not run one model at once.
    plain.stop(0)
    engine = start(model=on_gpu)
    for one in images:
        run(engine, [one])
    until = monotonic() + 60
    while len(changed_forms(engine)) < len(images):
        assert monotonic() < until, changed_forms(engine)
        sleep(0.05)
    launched = list[int]()
    evaluate = on_gpu.evaluate

    def counted(x: torch.Tensor, t: torch.Tensor, inputs: RowInputs) -> torch.Tensor:
        # Plain ones are still being recorded.
        if not inputs.plain:
            launched.append(len(x))
        return evaluate(x, t, inputs)

    monkeypatch.setattr(on_gpu, "evaluate", counted)
    for one, theirs in zip(images, expected, strict=True):
        assert np.array_equal(run(engine, [one]).pixels()[0], theirs)
    assert launched == []


@pytest.mark.usefixtures("without_gradients")
def test_recorded_calls_of_the_autoencoder_give_its_bits_beside_recorded_forwards(
    on_gpu: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_REPLAY_RATIO", 1e9)
    calls = AutoencoderCalls(on_gpu, lambda model: CudaRecorder(model.device))
    for call in calls.first_calls():
        call()
    for graphs in calls.graphs:
        while graphs.wanted:
            graphs.record()
    assert [graphs.rows for graphs in calls.graphs] == [[1, 2, 3, 4]] * 2
    x, t, inputs = given(on_gpu, 3, 0)
    forwards = record(on_gpu, (x, t, inputs))
    expected = on_gpu.evaluate(x, t, inputs)
    facts = on_gpu.facts
    for pictures in (3, 1, 4, 2):
        pixels = torch.randn(pictures, 3, facts.default_height, facts.default_width, device="cuda")
        latents = calls.encode(pixels)
        assert torch.equal(latents, on_gpu.encode_image(pixels))
        plain = on_gpu.decode(latents)
        torch.cuda.synchronize()
        for _ in range(10):
            with on_decoder_stream(on_gpu.device):
                drawn = calls.decode(latents)
            beside = forwards.evaluate(x, t, inputs, TickCost({1: 1.0}))
            torch.cuda.synchronize()
            assert torch.equal(drawn, plain)
            assert torch.equal(beside, expected)
