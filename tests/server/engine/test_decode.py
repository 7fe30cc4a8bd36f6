"""Finished images are decoded beside the ticks of the others."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from guidance.unguided import Unguided
from server.engine.engine import Engine
from server.engine.fair_queue import Turns
from server.engine.state.sequence import ImageResult, Sequence
from server.engine.tick import decode, stage
from server.engine.tick.decode import DECODER_BATCH, TICKS_OF_BACKLOG, Decoder
from server.engine.tick.host_copy import HostCopy
from server.engine.tick.stopwatch import Stopwatch
from server.errors import OutOfMemory
from tests.server.by_hand import task as toy_task
from tests.server.toy_model import SIDE, Ear, Toy


class Diary:
    """The real model, which records its calls in order."""

    def __init__(self, model):
        self._model = model
        self.entries: list[tuple[str, int]] = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def evaluate(self, x, *more):
        self.entries.append(("tick", len(x)))
        return self._model.evaluate(x, *more)

    def decode(self, latents):
        self.entries.append(("decode", len(latents)))
        return self._model.decode(latents)


def between_ticks(entries):
    """Calls of the decoder between each two ticks."""
    calls: list[list[int]] = [[]]
    for kind, size in entries:
        if kind == "tick":
            calls.append([])
        else:
            calls[-1].append(size)
    return calls[1:]


def test_images_that_finish_together_delay_a_tick_by_one_picture_at_most(
    start, model, task, listen
):
    diary = Diary(model)
    engine = start(model=diary, row_budget=8)
    diary.entries.clear()
    long, short = listen(1), listen(4)
    images = [task(rule="none", steps=2, seed=seed) for seed in range(4)]
    long.on_start = lambda: engine.submit(images, short)
    engine.submit([task(rule="none", steps=12)], long)
    long.wait()
    short.wait()
    calls = between_ticks(diary.entries)
    assert [sum(call) for call in calls if call] == [1] * 5
    assert max(len(call) for call in calls) == 1
    assert not long.errors
    assert not short.errors


def test_a_backlog_is_caught_up_with_in_a_few_ticks(start, model, task, listen):
    diary = Diary(model)
    engine = start(model=diary, row_budget=20)
    diary.entries.clear()
    long, short = listen(1), listen(12)
    images = [task(rule="none", steps=1, seed=seed) for seed in range(12)]
    long.on_start = lambda: engine.submit(images, short)
    engine.submit([task(rule="none", steps=15)], long)
    long.wait()
    short.wait()
    sizes = [size for call in between_ticks(diary.entries) for size in call]
    assert sizes[0] == -(-12 // TICKS_OF_BACKLOG)
    assert len(sizes) < 12
    assert all(len(call) <= 1 for call in between_ticks(diary.entries)[:-1])


def test_in_deterministic_mode_the_decoder_always_has_one_shape(fixed_engine, model, task, run):
    """So a picture's bits do not depend on how many finish with it."""
    tasks = [task(steps=1, seed=seed) for seed in range(6)]
    together = run(fixed_engine, tasks).pixels()
    alone = [run(fixed_engine, [one]).pixels()[0] for one in tasks]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert DECODER_BATCH > 1


def test_an_image_that_is_cancelled_before_its_turn_is_not_decoded(start, model, task, listen):
    diary = Diary(model)
    engine = start(model=diary, row_budget=8)
    diary.entries.clear()
    long, doomed = listen(1), listen(4)
    images, submissions = [task(rule="none", steps=2, seed=seed) for seed in range(4)], []

    def cancel(step):
        if step == 4:
            submissions[0].cancel()

    long.on_start = lambda: submissions.append(engine.submit(images, doomed))
    long.on_progress = cancel
    engine.submit([task(rule="none", steps=12)], long)
    long.wait()
    doomed.wait()
    decoded = sum(size for kind, size in diary.entries if kind == "decode")
    # One may already be in the decoder when it is cancelled.
    assert 1 + len(doomed.results) <= decoded <= 2 + len(doomed.results) < 5
    assert engine.measurements.pending == 0


def test_an_engine_without_work_waits_for_pictures_only_until_something_else_is_to_be_done() -> (
    None
):
    """A stream's next frame must not wait until the one before it is decoded."""
    comes = iter([False, False, True])
    decoder = Decoder(
        torch.device("cpu"),
        Turns(),
        lambda: False,
        lambda model, _: model.decode,
        lambda _: next(comes),
        fixed=False,
    )
    unfinished: Any = SimpleNamespace(pixels_and_finite=SimpleNamespace(ready=False))
    decoder._in_flight.append(unfinished)
    assert list(decoder._finished(idle=True)) == []
    assert not list(comes)
    assert list(decoder._in_flight) == [unfinished]


def test_an_error_of_decoding_that_is_seen_while_waiting_ends_its_images_alone() -> None:
    """It does not end the engine, as long as the device answers."""

    class Failing:
        @property
        def ready(self) -> bool:
            raise RuntimeError("CUDA error: invalid argument")

        def fetch(self) -> None:
            raise RuntimeError("CUDA error: invalid argument")

    decoder = Decoder(
        torch.device("cpu"),
        Turns(),
        lambda: False,
        lambda model, _: model.decode,
        lambda _: False,
        fixed=False,
    )
    image: Any = object()
    failing: Any = SimpleNamespace(sequences=[image], pixels_and_finite=Failing())
    for idle in (True, False):
        decoder._in_flight.append(failing)
        [(ended, error)] = decoder._finished(idle=idle)
        assert ended is image
        assert isinstance(error, RuntimeError)


def test_what_waited_before_is_nothing_else_to_be_done() -> None:
    engine = Engine({"toy": Toy()}, row_budget=2, guessed_costs={1: 0.01})
    with torch.inference_mode():
        engine._warm_up()
        assert not engine._interrupted(0)
        engine.submit([toy_task(seed=seed) for seed in range(40)], Ear(40))
        assert engine._interrupted(0)
        engine._admit()
        assert len(engine._arrived)
        assert not engine._interrupted(0)
        engine.submit([toy_task()], Ear(1))
        assert engine._interrupted(0)


class SecondLook(HostCopy):
    """A copy that is under way at the first look and has arrived at the second."""

    looks = 0

    @property
    def ready(self) -> bool:
        self.looks += 1
        return self.looks > 1


def test_a_picture_is_handed_over_while_the_device_works_on_the_next_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would wait for the end of the tick, and its stream for it."""
    order: list[str] = []
    told: Any = stage._read_to_host

    class Listener(Ear):
        def finished(self, index: int, result: ImageResult) -> None:
            order.append(f"picture {index}")
            super().finished(index, result)

    def waited(steps: Any) -> Any:
        order.append("wait")
        return told(steps)

    monkeypatch.setattr(stage, "_read_to_host", waited)
    monkeypatch.setattr(decode, "HostCopy", SecondLook)
    monkeypatch.setattr(decode, "on_decoder_stream", nullcontext)
    monkeypatch.setattr(decode, "Stopwatch", lambda _: Stopwatch(torch.device("cpu")))
    engine = Engine({"toy": Toy()}, row_budget=4, guessed_costs={1: 0.01})
    engine._warm_up()
    engine._decoder._device = Mock(type="cuda")
    tasks = [toy_task(rule=Unguided(), steps=steps) for steps in (1, 3)]
    engine.submit(tasks, Listener(2))
    with torch.inference_mode():
        for _ in range(2):
            engine._tick()
    assert order == ["wait", "picture 0", "wait"]


def test_a_picture_without_room_in_host_memory_fails_alone_while_the_device_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its error is not one of the images whose stage runs, and its client hears of it."""
    result = Sequence.result

    def made(sequence: Sequence, pixels: Any) -> ImageResult:
        if sequence.index == 0:
            raise MemoryError
        return result(sequence, pixels)

    monkeypatch.setattr(Sequence, "result", made)
    monkeypatch.setattr(decode, "HostCopy", SecondLook)
    monkeypatch.setattr(decode, "on_decoder_stream", nullcontext)
    monkeypatch.setattr(decode, "Stopwatch", lambda _: Stopwatch(torch.device("cpu")))
    engine = Engine({"toy": Toy()}, row_budget=4, guessed_costs={1: 0.01})
    engine._warm_up()
    engine._decoder._device = Mock(type="cuda")
    ear = Ear(2)
    engine.submit([toy_task(rule=Unguided(), steps=steps) for steps in (1, 3)], ear)
    with torch.inference_mode():
        for _ in range(6):
            engine._tick()
    assert [type(error) for error in ear.errors.values()] == [OutOfMemory]
    assert list(ear.results) == [1]
    assert engine.measurements.pending == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_picture_without_room_beside_one_that_is_decoded_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The error of the other one, if it has any, is its own."""
    running, first = list[HostCopy](), list[HostCopy]()

    class Copy(HostCopy):
        def __init__(self, *tensors: torch.Tensor) -> None:
            super().__init__(*tensors)
            running.append(self)
            first.append(self)
            self.looks = 0

        @property
        def ready(self) -> bool:
            self.looks += 1
            if self.looks > 2 and self in running:
                running.remove(self)
            return self not in running

        def fetch(self) -> tuple[torch.Tensor, ...]:
            if self in running:
                running.remove(self)
            if fails and self is first[0]:
                raise RuntimeError("broken")
            return super().fetch()

    class Small(Toy):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            if running:
                raise torch.OutOfMemoryError("no room for two")
            return super().decode(latents)

    monkeypatch.setattr(decode, "HostCopy", Copy)
    monkeypatch.setattr(decode, "on_decoder_stream", nullcontext)
    monkeypatch.setattr(decode, "Stopwatch", lambda _: Stopwatch(torch.device("cpu")))
    engine = Engine({"toy": Small()}, row_budget=4, guessed_costs={1: 0.01})
    engine._warm_up()
    engine._decoder._device = Mock(type="cuda")
    ear = Ear(2)
    one = toy_task(rule=Unguided(), steps=1)
    engine.submit([one, replace(one, width=2 * SIDE)], ear)
    with torch.inference_mode():
        for _ in range(6):
            engine._tick()
    assert len(ear.results) == 2 - fails
    assert len(ear.errors) == fails
    assert not any(isinstance(error, OutOfMemory) for error in ear.errors.values())


def test_pixels_that_are_kept_are_copied_to_the_device_before_the_decoder_is_launched() -> None:
    """A copy from the host waits for all work before it, and the next tick would wait for it."""
    order, image, mask = list[str](), torch.zeros(3, SIDE, SIDE), torch.ones(SIDE, SIDE)

    class Noting(Toy):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            order.append("decode")
            return super().decode(latents)

    class Copies(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.Tensor.to and any(args[0] is one for one in (image, mask)):
                order.append("copy")
            return func(*args, **(kwargs or {}))

    engine = Engine({"toy": Noting()}, row_budget=4, guessed_costs={1: 0.01})
    engine._warm_up()
    order.clear()
    ear = Ear(1)
    engine.submit([toy_task(rule=Unguided(), steps=1, image=image, mask=mask)], ear)
    with torch.inference_mode(), Copies():
        engine._tick()
    assert order == ["copy", "copy", "decode"]
    assert not ear.errors
