"""The edits that negative token merging makes to a network, and their window."""

import numpy as np
import pytest
from pydantic import ValidationError

from guidance import NegToMe
from guidance.edits import ApartFrom


def test_its_edit_says_all_but_which_row_is_the_reference() -> None:
    assert NegToMe().edit == ApartFrom(("up_blocks",), 0.9, 0.7, None)
    asked = NegToMe.model_validate({"strength": 0.5, "threshold": 0.6, "layers": ["middle"]})
    assert asked.edit == ApartFrom(("middle",), 0.5, 0.6)


def test_by_default_it_acts_in_the_first_fifth_of_the_steps() -> None:
    progress = np.arange(20) / 20
    ratio = np.geomspace(14, 0.03, 20)
    assert NegToMe().contains(ratio, progress).tolist() == [True] * 4 + [False] * 16


@pytest.mark.parametrize("fields", [{"threshold": 1.0}, {"strength": 0.0}, {"layers": ()}])
def test_what_would_move_nothing_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NegToMe.model_validate(fields)
