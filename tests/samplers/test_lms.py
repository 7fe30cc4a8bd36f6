"""LMS, beyond the contract of all samplers."""

from samplers.lms import LMS
from samplers.testing import SlopeRange, measured_order
from tests.samplers.cases import FLOW


def test_order_four_shows_before_the_first_steps_do() -> None:
    assert 3.75 < measured_order(LMS(), SlopeRange(FLOW, 0.99, 0.05)) < 4.25
