"""CUDA graphs beside other work of their process, and copies between host and device.

Skipped without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.capture import CapturedForward, CudaRecorder
from server.engine.state.noise import stage_noise
from server.engine.tick import weave
from server.engine.tick.host_copy import HostCopy
from server.models.memory import reclaim, unused_bytes

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")

BUSY = 2_000_000
"""Cycles, about a millisecond, by which the device falls behind the host."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Product:
    """A product of few rows and many addends, which cuBLAS divides among parts of a workspace."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, 2**15, generator=drawn).to(GPU, torch.float16)
        self.weight = torch.randn(2**15, 64, generator=drawn).to(GPU, torch.float16) / 2**8
        self.expected = self(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def recorded(self, recorder: CudaRecorder) -> CapturedForward:
        assert recorder.fits(lambda: self(self.x), inf)
        return recorder.record(self, [self.x])

    def is_given_by(self, recording: CapturedForward) -> bool:
        return torch.equal(recording(self.x), self.expected)


def test_recordings_write_to_no_memory_that_went_with_others_of_their_stream() -> None:
    product, kept, passing = Product(), CudaRecorder(GPU), CudaRecorder(GPU)
    recordings = [product.recorded(kept) for _ in range(3)]
    others = [product.recorded(passing) for _ in range(2)]
    recordings.pop(0).release()
    for one in others:
        one.release()
    passing.reset_pool()
    reclaim(GPU)
    taken = [torch.full((2**23,), 7, dtype=torch.uint8, device=GPU) for _ in range(128)]
    for recording in recordings:
        assert product.is_given_by(recording)
        assert all(bool((one == 7).all()) for one in taken)
        recording.release()


def test_products_of_another_thread_are_right_while_recordings_come_and_go() -> None:
    product, recorder = Product(), CudaRecorder(GPU)
    begun, over = Event(), Event()

    def multiply() -> int:
        wrong = 0
        with torch.inference_mode():
            while not over.is_set():
                wrong += not torch.equal(product(product.x), product.expected)
                begun.set()
        return wrong

    with ThreadPoolExecutor(1) as threads:
        wrong = threads.submit(multiply)
        assert begun.wait(30)
        try:
            for _ in range(20):
                recording = product.recorded(recorder)
                assert product.is_given_by(recording)
                recording.release()
                recorder.reset_pool()
                torch.cuda.empty_cache()
        finally:
            over.set()
        assert wrong.result(30) == 0


def test_two_threads_record_at_once() -> None:
    """As two engines of a process do."""
    product = Product()

    def work(recorder: CudaRecorder) -> bool:
        with torch.inference_mode():
            made = [product.recorded(recorder) for _ in range(5)]
            right = [product.is_given_by(one) for one in made]
            for one in made:
                one.release()
        return all(right)

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(work, (CudaRecorder(GPU), CudaRecorder(GPU))))


def waits(x: Tensor) -> Tensor:
    """The host reads a value, which a capture does not allow."""
    return x * x.sum().item()


def takes_too_much(x: Tensor) -> Tensor:
    return x + torch.empty(2**44, dtype=torch.uint8, device=GPU)[:1]


@pytest.mark.parametrize(
    ("forward", "error"), [(waits, RuntimeError), (takes_too_much, torch.OutOfMemoryError)]
)
def test_a_capture_that_fails_leaves_all_as_it_was(forward: Any, error: type[Exception]) -> None:
    product, recorder = Product(), CudaRecorder(GPU)

    def come_and_go() -> None:
        made = [product.recorded(recorder)]
        before = torch.cuda.current_stream()
        with pytest.raises(error):
            recorder.record(forward, [product.x])
        assert torch.cuda.current_stream() == before
        made.append(product.recorded(recorder))
        for one in made:
            assert product.is_given_by(one)
            one.release()
        recorder.reset_pool()
        reclaim(GPU)

    # Once beforehand, since libraries keep memory for a stream.
    come_and_go()
    before = torch.cuda.memory_reserved()
    come_and_go()
    assert torch.cuda.memory_reserved() <= before


def test_memory_that_is_said_to_be_unused_can_be_had_beside_recordings() -> None:
    recorder, x = CudaRecorder(GPU), torch.ones(2**20, device=GPU)

    def spacious(x: Tensor) -> Tensor:
        return x.expand(256, -1).contiguous().sum(0)

    assert recorder.fits(lambda: spacious(x), inf)
    recording = recorder.record(spacious, [x])
    assert recorder.nbytes >= 2**30
    reclaim(GPU)
    all_but_some = unused_bytes(GPU) - 2**28
    assert torch.empty(all_but_some, dtype=torch.uint8, device=GPU).nbytes == all_but_some
    recording.release()
    # Tests in other processes need memory, too.
    reclaim(GPU)


def test_copies_to_the_host_hold_what_was_there_when_they_were_asked_for() -> None:
    copies: list[HostCopy] = []
    for number in range(50):
        torch.cuda._sleep(BUSY)
        # Its memory is free for the next one at once.
        copies.append(HostCopy(torch.full((2**18,), number, device=GPU)))
    assert not copies[-1].ready
    for number, copy in enumerate(copies):
        [arrived] = copy.fetch()
        assert bool((arrived == number).all())


def test_noise_arrives_on_a_busy_device_as_it_was_drawn() -> None:
    lane, sent = SimpleNamespace(model=SimpleNamespace(device=GPU), shape=(4, 64, 64)), list[Any]()
    for seed in range(50):
        torch.cuda._sleep(BUSY)
        image = SimpleNamespace(task=SimpleNamespace(seed=seed), stage=0)
        batch: Any = SimpleNamespace(lane=lane, sequences=[image])
        # Its pinned memory is free for the next one at once.
        sent.append(weave._fresh_noise(batch, [0]))
    for seed, noise in enumerate(sent):
        assert torch.equal(noise[0].cpu(), stage_noise(seed, 0, lane.shape))
