"""What tests of training share."""

from typing import Any

import pytest
from torch.optim import AdamW


@pytest.fixture
def steps_made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An entry for each step of an optimiser; a run that goes on makes only those that are left."""
    made: list[object] = []
    step = AdamW.step

    def counted(self: AdamW, *arguments: Any, **options: Any) -> Any:
        made.append(self)
        return step(self, *arguments, **options)

    monkeypatch.setattr(AdamW, "step", counted)
    return made
