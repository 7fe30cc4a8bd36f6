"""When listeners are told of the steps of their images."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.scheduler import Priority
from server.engine.tick import stage
from server.engine.tick.host_copy import HostCopy
from server.errors import DeviceLost
from server.models.inputs import RowInputs
from tests.server.by_hand import task
from tests.server.toy_model import Ear, Toy

STEPS = 4


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of events in ticks: forwards, waits for the device, and reports of steps."""
    happened: list[str] = []
    wait: Any = stage._read_to_host

    def waited(steps: Any) -> Any:
        happened.append("wait")
        return wait(steps)

    monkeypatch.setattr(stage, "_read_to_host", waited)
    return happened


def ticks(
    order: list[str],
    device: str,
    previews: bool,
    fails_at: int = 0,
    priority: Priority = Priority.INTERACTIVE,
) -> None:
    """Run an image in this thread, tick by tick, with a listener that fails at a step."""

    class Model(Toy):
        def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
            order.append("forward")
            return super().evaluate(x, t, inputs)

    class Listener(Ear):
        def progress(self, index: int, step: int, steps: int, preview: object) -> None:
            assert (preview is not None) == (previews and step < steps)
            order.append(f"step {step}")
            if step == fails_at:
                raise RuntimeError

        def finished(self, index: int, result: Any) -> None:
            order.append("finished")

        def failed(self, index: int, error: Exception) -> None:
            order.append(type(error).__name__)

    engine = Engine({"toy": Model()}, row_budget=2, guessed_costs={1: 0.01})
    engine._warm_up()
    engine._device = Mock(type=device)
    order.clear()
    engine.submit([task(steps=STEPS, previews=previews, priority=priority)], Listener(1))
    with torch.inference_mode():
        while engine.measurements.pending:
            engine._tick()


@pytest.mark.parametrize("previews", [False, True])
def test_steps_are_told_while_a_gpu_works_on_the_next_ones(
    order: list[str], previews: bool
) -> None:
    """The listeners take time, too, and the next forward must not wait for them."""
    ticks(order, "cuda", previews)
    assert order == [
        *("forward", "wait"),
        *("forward", "step 1", "wait"),
        *("forward", "step 2", "wait"),
        *("forward", "step 3", "wait"),
        *("step 4", "finished"),
    ]


def test_the_last_step_of_a_live_frame_is_told_while_a_gpu_works_on_it(order: list[str]) -> None:
    """Its stream then has the next frame ready when this one leaves the denoiser."""
    ticks(order, "cuda", previews=False, priority=Priority.LIVE)
    assert order == [
        *("forward", "wait"),
        *("forward", "step 1", "wait"),
        *("forward", "step 2", "wait"),
        *("forward", "step 3", "step 4", "wait"),
        "finished",
    ]


def test_steps_are_told_at_once_where_a_cpu_would_be_busy_with_the_next_ones(
    order: list[str],
) -> None:
    ticks(order, "cpu", previews=True)
    assert order == [
        *("forward", "wait", "step 1"),
        *("forward", "wait", "step 2"),
        *("forward", "wait", "step 3"),
        *("forward", "wait", "step 4"),
        "finished",
    ]


def test_a_device_that_is_lost_as_previews_are_fetched_is_no_failure_of_an_image(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching them is the first wait for a GPU in a tick, and so raises what broke the GPU."""

    def fetch(_: HostCopy) -> tuple[Tensor, ...]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(HostCopy, "fetch", fetch)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        ticks(order, "cuda", previews=True)
    assert order == ["forward", "wait", "forward"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_listener_that_fails_at_the_last_step_cancels_its_image(
    order: list[str], device: str
) -> None:
    ticks(order, device, previews=False, fails_at=STEPS)
    assert order[-2:] == [f"step {STEPS}", "Cancelled"]
