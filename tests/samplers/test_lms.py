"""LMS beyond what every sampler promises."""

import numpy as np

from samplers.lms import LMS
from tests.samplers.cases import FLOW
from tests.samplers.test_convergence import STEPS, errors


def test_order_four_shows_before_the_first_steps_do() -> None:
    slope = -np.polyfit(np.log(STEPS), np.log(errors(LMS(), FLOW, 0.99, 0.05)), 1)[0]
    assert 3.75 < slope < 4.25
