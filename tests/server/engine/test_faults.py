"""Errors of an image, of memory and of the device are distinguished, with separate effects."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.engine import Engine
from server.engine.faults import attempt, is_out_of_memory
from server.engine.state.row_cap import RECOVERY_TICKS, RowCap
from server.errors import DeviceLost, InvalidRequest, NotReady, RowFailed
from tests.covering import EVERY_CELL
from tests.server.engine.conftest import PATIENCE_S

CPU = torch.device("cpu")
LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."


class Faulty:
    """The real model, with a fault that is raised where the test puts it."""

    def __init__(self, model):
        self._model = model
        self.faults: dict[str, BaseException] = {}

    def __getattr__(self, name):
        return getattr(self._model, name)

    def evaluate(self, *given):
        self._fault("evaluate")
        return self._model.evaluate(*given)

    def decode(self, latents):
        self._fault("decode")
        return self._model.decode(latents)

    def _fault(self, place):
        if place in self.faults:
            raise self.faults[place]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA error: out of memory", "memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "memory"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "memory"),
        (
            "alloc_cpu.cpp:124. DefaultCPUAllocator: can't allocate memory",
            "memory",
        ),
        (LOST, "device"),
        ("CUDA error: device-side assert triggered", "device"),
        ("CUDA error: uncorrectable ECC error encountered", "device"),
        ("CUDA error: invalid argument", "image"),
        ("shapes cannot be multiplied (2x3 and 4x5)", "image"),
    ],
)
def test_errors_are_told_apart_by_what_still_works(message, kind):
    def work():
        raise RuntimeError(message)

    if kind == "device":
        with pytest.raises(DeviceLost, match="must restart: CUDA error"):
            attempt(work, CPU)
        return
    error = attempt(work, CPU)
    assert isinstance(error, RuntimeError)
    assert is_out_of_memory(error) == (kind == "memory")


def test_an_error_of_memory_does_not_hold_the_tensors_that_had_no_room():
    def work():
        large = torch.empty(10)
        raise torch.OutOfMemoryError(f"no room beside {len(large)}")

    error = attempt(work, CPU)
    assert isinstance(error, torch.OutOfMemoryError)
    assert error.__traceback__ is None


def test_the_rows_of_a_lane_halve_with_its_memory_and_recover_slowly():
    cap = RowCap(64)
    cap.overflow(64)
    cap.overflow(20)
    assert cap.rows == 10
    for _ in range(RECOVERY_TICKS):
        cap.fit(9)
    assert cap.rows == 10, "ticks that were not full prove nothing"
    for _ in range(RECOVERY_TICKS):
        cap.fit(10)
    assert cap.rows == 11
    for _ in range(100 * RECOVERY_TICKS):
        cap.fit(cap.rows)
    assert cap.rows == 64


FAULTS: list[tuple[str, BaseException]] = [
    ("evaluate", RuntimeError(LOST)),
    ("decode", SystemExit("thread's end")),
]
CROSSED: list[tuple[str, BaseException]] = [(FAULTS[k][0], FAULTS[1 - k][1]) for k in (0, 1)]


@pytest.mark.parametrize(("place", "fault"), FAULTS + CROSSED if EVERY_CELL else FAULTS)
def test_a_lost_device_ends_everything_at_once_with_one_sentence(model, task, listen, place, fault):
    ended = Event()
    faulty: Any = Faulty(model)
    engine = Engine({"embedded": faulty}, row_budget=4, on_failure=ended.set)
    engine.start()
    while not engine.ready:
        Event().wait(0.01)
    heard = listen(3)
    faulty.faults[place] = fault
    engine.submit([task(steps=1, seed=seed) for seed in range(3)], heard)
    heard.wait()
    assert ended.wait(PATIENCE_S)
    sentences = {str(error) for error in heard.errors.values()}
    assert len(heard.errors) == 3
    assert len(sentences) == 1
    assert all(isinstance(error, NotReady) for error in heard.errors.values())
    assert engine.failure is not None
    assert not engine.ready
    assert engine.measurements.pending == 0
    with pytest.raises(NotReady, match="must"):
        engine.reserve(1)
    if isinstance(fault, RuntimeError):
        assert "an illegal memory access was encountered" in sentences.pop()


def test_an_engine_that_cannot_even_tell_its_listeners_says_that_it_failed(model, task, listen):
    ended = Event()
    faulty: Any = Faulty(model)
    engine = Engine({"embedded": faulty}, row_budget=4, on_failure=ended.set)
    engine.start()
    while not engine.ready:
        Event().wait(0.01)
    heard = listen(1)

    def fail(*_):
        raise SystemExit

    heard.failed = fail
    faulty.faults["evaluate"] = RuntimeError(LOST)
    engine.submit([task(steps=1)], heard)
    assert ended.wait(PATIENCE_S)
    assert isinstance(engine.failure, DeviceLost)


def test_what_did_not_fit_alone_is_refused_at_once_where_it_is_as_large(start, model, task, run):
    faulty = Faulty(model)
    engine = start(model=faulty)
    for place in ("evaluate", "decode"):
        faulty.faults[place] = torch.OutOfMemoryError("no room")
        heard = run(engine, [task(steps=1)])
        assert isinstance(heard.errors[0], RowFailed)
        assert "not enough memory" in str(heard.errors[0])
        faulty.faults.clear()
        with pytest.raises(InvalidRequest, match=r"96 x 96 pixels did not fit into the \d+ MB"):
            run(engine, [task(steps=1)])
        assert not run(engine, [replace(task(steps=1), width=64, height=64)]).errors
        engine._overflows.forget()
    assert engine.measurements.pending == 0
    assert not run(engine, [task(steps=1)]).errors


def test_a_preview_that_fails_costs_the_preview(start, task, run, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    engine = start()
    plain = run(engine, [task(steps=3)]).pixels()[0]
    monkeypatch.setattr("server.engine.reports.previews", fail)
    heard = run(engine, [task(steps=3, previews=True)])
    assert np.array_equal(heard.pixels()[0], plain)
    assert heard.steps == [(0, k, 3) for k in (1, 2, 3)]
    assert not heard.previews


def test_a_listener_that_raises_costs_its_own_images(start, task, run, listen):
    engine = start()
    deaf = listen(1)

    def fail(step):
        raise RuntimeError("nobody is at home")

    deaf.on_progress = fail
    engine.submit([task(steps=3)], deaf)
    assert not run(engine, [task(steps=3)]).errors
    deaf.wait()
    assert list(deaf.errors) == [0]


def test_all_previews_of_a_tick_are_one_transfer(start, task, run, monkeypatch):
    import server.engine.reports as module

    made: list[int] = []
    real = module.previews

    def counted(denoised, colors):
        made.append(len(denoised))
        return real(denoised, colors)

    monkeypatch.setattr(module, "previews", counted)
    engine = start(row_budget=6)
    heard = run(engine, [task(rule="none", steps=3, seed=s, previews=True) for s in range(5)])
    assert len(heard.previews) == 10
    assert sum(made) == 10
    assert len(made) <= 4
