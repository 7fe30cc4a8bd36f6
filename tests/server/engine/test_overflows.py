"""Work that did not fit in memory alone is refused for a while, and so is work as large."""

from __future__ import annotations

import pytest

from server.engine.state.overflows import OVERFLOW_EXPIRY_S, Overflows
from server.errors import InvalidRequest

MB = 2**20


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_only_as_much_of_the_same_model_is_refused() -> None:
    known = Overflows(Clock())
    known.note("m", 1024, 1024, 2, free=300 * MB)
    known.check("m", 1024, 1024, 1)
    known.check("m", 1024, 1016, 2)
    known.check("other", 2048, 2048, 8)
    for width, height in ((1024, 1024), (512, 2048), (2048, 1024)):
        with pytest.raises(InvalidRequest, match="1024 x 1024 pixels did not fit into the 300 MB"):
            known.check("m", width, height, 2)


def test_rows_that_are_too_many_are_said_to_be_what_is_wrong() -> None:
    known = Overflows(Clock())
    known.note("m", 1024, 1024, 2, free=0)
    with pytest.raises(InvalidRequest, match="fewer branches") as refusal:
        known.check("m", 768, 768, 4)
    assert refusal.value.field == "guidance"


def test_the_smallest_overflow_counts_until_it_is_believed_no_longer() -> None:
    clock = Clock()
    known = Overflows(clock)
    known.note("m", 512, 512, 1, free=0)
    clock.seconds = OVERFLOW_EXPIRY_S / 2
    known.note("m", 1024, 1024, 1, free=0)
    with pytest.raises(InvalidRequest):
        known.check("m", 512, 512, 1)
    clock.seconds = OVERFLOW_EXPIRY_S
    known.check("m", 1024, 1024, 1)
    known.note("m", 512, 512, 1, free=0)
    known.forget()
    known.check("m", 512, 512, 1)


def test_the_autoencoder_s_overflow_says_nothing_of_many_rows_of_smaller_pictures() -> None:
    known = Overflows(Clock())
    known.note("m", 2048, 2048, None, free=0)
    known.check("m", 1536, 1536, 2)
    known.check("m", 512, 512, 64)
    with pytest.raises(InvalidRequest, match="2048 x 2048 pixels did not fit"):
        known.check("m", 2048, 2048, 1)
    known.note("m", 2560, 2560, 1, free=0)
    with pytest.raises(InvalidRequest, match="2048 x 2048 pixels did not fit"):
        known.check("m", 2048, 2048, 1)
