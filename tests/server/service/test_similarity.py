"""The stochastic similarity filter against its formula, and against counts of what it skips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.requests.stream_schema import SimilarityFilter
from server.service.similarity import FrameFilter, skip_probability

FRAMES = 4000


def frame(cosine: float) -> Tensor:
    """A frame with this cosine similarity to `frame(1)`."""
    flat = torch.zeros(3, 4, 4)
    flat[0, 0, 0], flat[0, 0, 1] = cosine, (1 - cosine**2) ** 0.5
    return flat


@pytest.mark.parametrize(
    ("cosine", "probability"), [(1.0, 1.0), (0.99, 0.5), (0.98, 0.0), (0.3, 0.0), (-1.0, 0.0)]
)
def test_the_probability_rises_from_0_at_the_threshold_to_1_for_equal_frames(
    cosine: float, probability: float
) -> None:
    assert skip_probability(cosine, 0.98) == pytest.approx(probability)


def test_frames_are_skipped_as_often_as_the_formula_says() -> None:
    settings = SimilarityFilter(threshold=0.9, max_skip=1000)
    skipped = 0
    for seed in range(FRAMES):
        sieve = FrameFilter(seed)
        assert not sieve.skips(frame(1.0), settings), "there is nothing to compare it with"
        skipped += sieve.skips(frame(0.97), settings)
    assert skipped / FRAMES == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / FRAMES) ** 0.5)


def test_a_frame_is_compared_with_the_last_one_processed_and_not_with_a_skipped_one() -> None:
    settings = SimilarityFilter(threshold=0.0)
    sieve = FrameFilter(0)
    drifting = [frame(1 - step / 40) for step in range(40)]
    skipped = [sieve.skips(one, settings) for one in drifting]
    processed = [k for k, skip in enumerate(skipped) if not skip]
    assert processed[0] == 0
    assert len(processed) > 2, "each step is small, but they add up"


def test_after_max_skip_frames_in_a_row_one_is_processed_and_the_count_begins_anew() -> None:
    settings = SimilarityFilter(threshold=0.5, max_skip=2)
    sieve = FrameFilter(0)
    same = frame(1.0)
    assert [sieve.skips(same, settings) for _ in range(7)] == [False, True, True] * 2 + [False]


def test_a_frame_that_must_run_is_what_later_ones_are_compared_with() -> None:
    settings = SimilarityFilter(threshold=0.5)
    sieve = FrameFilter(0)
    sieve.skips(frame(1.0), settings)
    assert not sieve.skips(frame(0.0), settings, must_run=True)
    assert sieve.skips(frame(0.0), settings)


def test_a_forgotten_or_otherwise_sized_frame_is_no_reason_to_skip() -> None:
    settings = SimilarityFilter(threshold=0.5)
    sieve = FrameFilter(0)
    assert not sieve.skips(torch.ones(3, 4, 4), settings)
    assert not sieve.skips(torch.ones(3, 8, 8), settings)
    sieve.forget()
    assert not sieve.skips(torch.ones(3, 8, 8), settings)


def test_the_same_seed_skips_the_same_frames() -> None:
    settings = SimilarityFilter(threshold=0.9, max_skip=1000)

    def skipped(seed: int) -> list[bool]:
        sieve = FrameFilter(seed)
        return [sieve.skips(frame(1.0 - 0.05 * (k % 2)), settings) for k in range(100)]

    assert skipped(1) == skipped(1)
    assert skipped(1) != skipped(2)
