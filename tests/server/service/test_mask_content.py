"""What fills the repainted part of a picture at first."""

from __future__ import annotations

import numpy as np

from server.service.mask_content import filled


def test_the_colours_around_fill_a_part_of_which_nothing_is_left() -> None:
    picture = np.zeros((96, 96, 3), np.uint8)
    picture[:, :48], picture[:, 48:] = (200, 0, 0), (0, 0, 200)
    mask = np.zeros((96, 96), np.uint8)
    mask[24:72, 24:72] = 255
    made = filled(picture, mask)
    assert (made[mask == 0] == picture[mask == 0]).all()
    left, middle, right = (made[48, x].astype(int) for x in (26, 48, 69))
    assert left[0] > middle[0] > right[0]
    assert left[2] < middle[2] < right[2]
    assert made[..., 1].max() == 0
    painted = picture.copy()
    painted[mask > 0] = 255
    assert (filled(painted, mask) == made).all()
