"""A model with random weights is the same for both systems, which share no module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.architectures import Architecture, build
from benchmarks.peers import Diffusers
from benchmarks.traffic import homogeneous


@pytest.fixture(scope="module")
def made() -> Architecture:
    return build("tiny_sdxl", "cpu", "float32")


def test_hosted_model_and_pipeline_have_equal_weights_and_no_network_in_common(
    made: Architecture,
) -> None:
    ours, theirs = made.hosted.modules()["unet"], made.denoiser
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name])
        assert weight.data_ptr() != expected[name].data_ptr()
    assert not any(module._forward_hooks for module in theirs.modules())
    assert theirs.conv_in.weight.is_contiguous()


def test_a_pipeline_whose_time_is_over_begins_no_further_batch(made: Architecture) -> None:
    requests = [replace(request, steps=1) for request in homogeneous(6)]
    outcome = Diffusers(made, largest=2).run(requests, until=0)
    assert outcome.batches == [2]
    assert len(outcome.latencies) == 2
    assert outcome.share == pytest.approx(1 / 3)
