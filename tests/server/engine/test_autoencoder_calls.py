"""Recorded calls of an autoencoder give the same bits as the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from math import inf
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from embedded import MODEL_FOLDER
from server.engine.autoencoder_calls import AutoencoderCalls, Pace, decoder_of, encoder_of
from server.engine.engine import Engine
from server.engine.preparation import Preparation
from server.engine.scheduler import Priority
from server.engine.tick.decode import DECODER_BATCH, MAX_DECODER_PIXELS
from server.models.autoencoder import Autoencoder
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.server.by_hand import task
from tests.server.engine.conftest import PATIENCE_S
from tests.server.engine.operation_tape import OperationTape, Repeated
from tests.server.toy_model import SIDE, Toy, run, started


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep recordings whatever time they save, since on a CPU they save none."""
    monkeypatch.setattr("server.engine.graphs.MAX_REPLAY_RATIO", 1e9)


@pytest.fixture(scope="module")
def model() -> HostedModel:
    return load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")


class Tapes:
    """Makes a recorder for each caller, and keeps them."""

    def __init__(self) -> None:
        self.made: list[OperationTape] = []

    def __call__(self, model: HostedModel) -> OperationTape:
        self.made.append(OperationTape())
        return self.made[-1]

    @property
    def calls(self) -> list[int]:
        """Number of replays of all recordings, by recorder."""
        return [sum(one.calls for one in tape.made) for tape in self.made]


class Watched(Toy):
    """Counts the pictures of each call of its autoencoder."""

    def __init__(self, **facts: object) -> None:
        super().__init__(**facts)
        self.encoded: list[int] = []
        self.decoded: list[int] = []

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.encoded.append(len(pixels))
        return super().encode_image(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return super().decode(latents)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def record(calls: AutoencoderCalls) -> None:
    for graphs in calls.graphs:
        while graphs.wanted:
            graphs.record()


@torch.inference_mode()
@pytest.mark.parametrize("pictures", [1, 3])
def test_recorded_calls_of_the_embedded_autoencoder_give_its_bits(
    model: HostedModel, pictures: int
) -> None:
    tapes = Tapes()
    calls = AutoencoderCalls(model, tapes)
    shape = model.latent_shape(64, 64)
    halves: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]] = [
        (calls.encode, model.encode_image, (pictures, 3, 64, 64)),
        (calls.decode, model.decode, (pictures, *shape)),
    ]
    for ours, _, size in halves:
        ours(noise(1, *size))
    record(calls)
    before = tapes.calls
    for ours, plain, size in halves:
        for seed in (2, 3):
            assert torch.equal(ours(noise(seed, *size)), plain(noise(seed, *size)))
    assert [now - then for now, then in zip(tapes.calls, before, strict=True)] == [2, 2]


@torch.inference_mode()
def test_calls_of_the_first_numbers_of_pictures_are_recorded_after_their_first_call() -> None:
    calls = AutoencoderCalls(Watched(), Tapes())
    for call in calls.first_calls():
        call()
    record(calls)
    assert [graphs.rows for graphs in calls.graphs] == [[*range(1, DECODER_BATCH + 1)]] * 2


@torch.inference_mode()
def test_a_tiny_autoencoder_has_recordings_of_its_own() -> None:
    torch.manual_seed(0)
    model, tapes = Toy(), Tapes()
    model.tiny = Autoencoder(AutoencoderTiny().eval(), torch.device("cpu"))
    calls = AutoencoderCalls(model, tapes)
    for call in calls.first_calls():
        call()
    record(calls)
    before = tapes.calls
    for tiny in (False, True):
        latents, pixels = noise(2, 1, 4, SIDE // 8, SIDE // 8), noise(3, 1, 3, SIDE, SIDE)
        decoded, encoded = decoder_of(model, tiny)(latents), encoder_of(model, tiny)(pixels)
        assert torch.equal(calls.decode(latents, tiny=tiny), decoded)
        assert torch.equal(calls.encode(pixels, tiny=tiny), encoded)
    assert [now - then for now, then in zip(tapes.calls, before, strict=True)] == [2, 2]


@torch.inference_mode()
def test_a_tiny_autoencoder_is_recorded_though_the_models_own_cannot_be() -> None:
    """Its calls read tensors of the same shapes, and gain more, since they are shorter."""

    class Unsteady(Watched):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) + len(self.decoded)

    torch.manual_seed(0)
    model = Unsteady()
    model.tiny = Autoencoder(AutoencoderTiny().eval(), torch.device("cpu"))
    calls = AutoencoderCalls(model, Tapes())
    for call in calls.first_calls():
        call()
    record(calls)
    [_, decoder] = calls.graphs
    assert decoder.rows == [*range(1, DECODER_BATCH + 1)]


@torch.inference_mode()
def test_rounding_alone_keeps_an_autoencoder_from_being_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replay = Repeated.__call__
    monkeypatch.setattr(Repeated, "__call__", lambda *given: replay(*given) + 1e-6)
    calls = AutoencoderCalls(Watched(), Tapes())
    for call in calls.first_calls():
        call()
    record(calls)
    assert [graphs.rows for graphs in calls.graphs] == [[], []]


@torch.inference_mode()
def test_the_decoder_alone_is_recorded_on_the_stream_beside_the_ticks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its recordings share memory, and are replayed there."""
    beside, seen = [False], list[tuple[int, bool]]()

    @contextmanager
    def stream(_: torch.device) -> Generator[None]:
        beside[0] = True
        yield
        beside[0] = False

    class Watching(OperationTape):
        def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> Repeated:
            seen.append((given[0].shape[1], beside[0]))
            return super().record(evaluate, given)

    monkeypatch.setattr("server.engine.autoencoder_calls.on_decoder_stream", stream)
    calls = AutoencoderCalls(Watched(), lambda _: Watching())
    for call in calls.first_calls():
        call()
    record(calls)
    pixels, latents = 3, 4
    assert set(seen) == {(pixels, False), (latents, True)}


@torch.inference_mode()
def test_calls_that_keep_a_gpu_busy_by_themselves_are_not_recorded() -> None:
    model = Watched()
    calls = AutoencoderCalls(model, Tapes())
    side = int(MAX_DECODER_PIXELS**0.5)
    for sides in ((side, side), (side + 8, side)):
        calls.encode(torch.zeros(1, 3, *sides))
        calls.decode(torch.zeros(1, *model.latent_shape(*sides)))
    record(calls)
    asked = len(model.encoded), len(model.decoded)
    calls.encode(torch.zeros(1, 3, side, side))
    calls.decode(torch.zeros(1, *model.latent_shape(side, side)))
    assert (len(model.encoded), len(model.decoded)) == asked
    calls.encode(torch.zeros(1, 3, side + 8, side))
    calls.decode(torch.zeros(1, *model.latent_shape(side + 8, side)))
    assert (len(model.encoded), len(model.decoded)) == (asked[0] + 1, asked[1] + 1)


@torch.inference_mode()
def test_a_call_is_recorded_between_ticks_only_if_it_is_known_to_take_short() -> None:
    calls = AutoencoderCalls(Watched(), Tapes())
    [encoder, _] = calls.graphs
    for call in calls.first_calls():
        call()
    for seed in range(100):
        calls.encode(noise(seed, 1, 3, 64, 64))
    assert encoder.due(1e9)
    assert not encoder.due(0.0)


@torch.inference_mode()
def test_a_call_of_a_model_that_was_never_idle_is_timed_and_then_recorded_between_ticks() -> None:
    """Such as one that was loaded for the stream that uses it."""
    tapes = Tapes()
    calls = AutoencoderCalls(Watched(), tapes)
    [encoder, _] = calls.graphs
    for seed in range(100):
        calls.encode(noise(seed, 1, 3, 64, 64))
    assert encoder.due(0.0)
    encoder.record_piece(0.0)
    assert not encoder.due(0.0)
    assert not tapes.made[0].made
    while encoder.due(1e9):
        encoder.record_piece(1e9)
    assert encoder.rows == [1]


@torch.inference_mode()
def test_of_many_small_pictures_that_an_idle_gpu_decodes_at_once_no_recording_is_made() -> None:
    calls = AutoencoderCalls(Watched(), Tapes())
    for pictures in range(1, 2 * DECODER_BATCH):
        calls.decode(noise(pictures, pictures, 4, 4, 4))
    record(calls)
    assert calls.graphs[1].rows == [*range(1, DECODER_BATCH + 1)]


@torch.inference_mode()
def test_where_all_calls_have_the_same_number_of_pictures_no_other_is_prepared() -> None:
    model = Watched()
    calls = AutoencoderCalls(model, Tapes(), fixed=True)
    for call in calls.first_calls():
        call()
    assert {*model.encoded} == {*model.decoded} == {DECODER_BATCH}


def test_a_call_of_few_pixels_is_not_expected_to_take_less_than_the_smallest_that_was_timed() -> (
    None
):
    """It has as many operations, and the host takes as long to launch them."""
    pace = Pace()
    assert pace.seconds(1) == inf
    pace.note(1000, 0.5)
    pace.note(1000, 0.01)
    pace.note(4000, 0.012)
    assert pace.seconds(10) == pace.seconds(1000) == 0.01
    assert pace.seconds(1001) == 0.012
    assert pace.seconds(8000) == pytest.approx(0.024)


@torch.inference_mode()
def test_what_libraries_do_in_the_first_call_of_a_size_is_not_taken_for_its_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large picture is a single call, so its size would never be recorded between ticks."""
    now = [0.0]
    monkeypatch.setattr("server.engine.autoencoder_calls.perf_counter", lambda: now[0])

    class Cold(Watched):
        def encode_image(self, pixels: Tensor) -> Tensor:
            now[0] += 0.01 if self.encoded else 10.0
            return super().encode_image(pixels)

    calls = AutoencoderCalls(Cold(default_width=1024, default_height=1024), Tapes())
    for call in calls.first_calls():
        call()
    for seed in range(100):
        calls.encode(noise(seed, 1, 3, 64, 64))
    assert calls.graphs[0].due(0.1)


def engine_of(
    model: Toy, tapes: Callable[[HostedModel], OperationTape], monkeypatch: pytest.MonkeyPatch
) -> Engine:
    preparation = Preparation(tapes)
    monkeypatch.setattr("server.engine.idle_work.QUIET_S", 0.01)
    monkeypatch.setattr("server.engine.idle_work.Preparation", lambda *_, **__: preparation)
    engine = started(model, 4, prepares=True)
    until = monotonic() + PATIENCE_S
    while not engine.settled:
        assert monotonic() < until
        sleep(0.01)
    return engine


def test_frames_are_encoded_and_decoded_from_recordings_with_the_same_bits(monkeypatch) -> None:
    tasks = [
        task(seed=seed, steps=2, image=noise(seed, 3, SIDE, SIDE), priority=Priority.LIVE)
        for seed in range(3)
    ]
    plain = started(Toy(), 4)
    expected = [run(plain, [one]).results[0].pixels for one in tasks]
    plain.stop(0)
    model, tapes = Watched(), Tapes()
    engine = engine_of(model, tapes, monkeypatch)
    model.encoded, model.decoded = [], []
    drawn = [run(engine, [one]).results[0].pixels for one in tasks]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))
    engine.stop(0)
    assert (model.encoded, model.decoded) == ([], [])


def test_a_model_that_leaves_takes_the_recordings_of_its_autoencoder_along(monkeypatch) -> None:
    tapes = Tapes()
    engine = engine_of(Watched(), tapes, monkeypatch)
    assert engine.recorded_bytes == sum(tape.nbytes for tape in tapes.made)
    assert len(tapes.made) == 3, "the denoiser and both halves have memory of their own"
    assert all(tape.nbytes for tape in tapes.made)
    assert engine.remove_model("toy")
    engine.stop(0)
    assert not any(tape.nbytes for tape in tapes.made)


def test_an_encoder_without_room_keeps_nothing_else_from_being_recorded(monkeypatch) -> None:
    class Full(OperationTape):
        def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
            return False

    model = Watched()
    tapes = iter((OperationTape(), Full(), OperationTape()))
    engine = engine_of(model, lambda _: next(tapes), monkeypatch)
    model.encoded, model.decoded = [], []
    assert engine.prepared(model).recorded
    run(engine, [task(steps=2, image=noise(0, 3, SIDE, SIDE))])
    engine.stop(0)
    assert (model.encoded, model.decoded) == ([1], [])
