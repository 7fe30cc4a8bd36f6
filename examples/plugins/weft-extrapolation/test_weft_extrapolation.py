"""The sampler fulfils the contract of a sampler, and does what its paper says."""

import numpy as np
from weft_extrapolation import ExtrapolatedDDIM

from samplers import DDIM, SAMPLERS, NoiseSchedule
from samplers.testing import check_sampler, measured_order


def test_it_keeps_the_promises_of_a_sampler() -> None:
    check_sampler(ExtrapolatedDDIM())
    check_sampler(ExtrapolatedDDIM(strength=0.5))


def test_without_the_correction_it_is_ddim() -> None:
    grid = NoiseSchedule.flow().grid("karras", 9)
    plain, ours = DDIM().plan(grid), ExtrapolatedDDIM(strength=0.0).plan(grid)
    columns = [0, 2, 3, 4]
    np.testing.assert_allclose(ours.tables[:, :1, columns], plain.tables, atol=1e-12)


def test_the_correction_raises_the_order_to_two() -> None:
    assert measured_order(DDIM()) < 1.25
    assert measured_order(ExtrapolatedDDIM()) > 1.75


def test_weft_finds_it_once_it_is_installed() -> None:
    assert ExtrapolatedDDIM in SAMPLERS
