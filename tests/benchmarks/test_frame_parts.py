"""The parts of a frame cover all of it, and each second and operation belongs to one part."""

from __future__ import annotations

from time import sleep

import pytest
import torch
from torch import Tensor

from benchmarks.frame_parts import NETWORKS, FrameParts, watched
from server.engine.scheduler import Priority
from tests.server.by_hand import task
from tests.server.toy_model import SIDE, Toy, run, started

FRAMES = 7
STAGES = 3
DECODER_S = 0.1


class Slow(Toy):
    """A toy model whose decoder takes some time."""

    def decode(self, latents: Tensor) -> Tensor:
        sleep(DECODER_S)
        return super().decode(latents)


@pytest.fixture(scope="module")
def parts() -> FrameParts:
    engine, found = started(Slow(), 4), FrameParts(counts=True)
    with watched(engine, found):
        for seed in range(FRAMES):
            image = torch.full((3, SIDE, SIDE), seed / FRAMES)
            run(engine, [task(seed=seed, steps=STAGES, image=image, priority=Priority.LIVE)])
        engine.stop(10)
    return found


def test_the_parts_of_a_frame_add_up_to_its_time(parts: FrameParts) -> None:
    assert parts.frames == FRAMES - 3, "neither the first nor the last one counts"
    assert sum(part.seconds for part in parts.parts().values()) == pytest.approx(
        parts.frame_s, rel=0.1
    )


def test_a_frame_calls_each_network_as_often_as_it_has_stages_or_once(parts: FrameParts) -> None:
    assert [parts.parts()[name].calls for name in NETWORKS] == [1, STAGES, 1]


def test_seconds_of_a_network_are_of_no_other_part(parts: FrameParts) -> None:
    found = parts.parts()
    assert found["decoder"].median_s >= DECODER_S
    for around in ("pixels to the host", "rest of the ticks"):
        assert found[around].median_s < DECODER_S


def test_operations_of_a_part_are_those_that_it_asks_for_itself(parts: FrameParts) -> None:
    found = parts.operations()
    # The toy's encoder has a mean, a pool and a concatenation, its decoder two operations.
    assert [found[name] for name in ("encoder", "decoder")] == [3, 2]
    assert found["waiting for work"] == 0
    assert found["guidance and step"] > 0
