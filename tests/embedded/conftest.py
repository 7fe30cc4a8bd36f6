"""Fixtures for tests of training."""

from typing import Any

import pytest
from torch.optim import AdamW


@pytest.fixture
def steps_made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An entry for each optimizer step; a resumed run makes only the remaining ones."""
    made: list[object] = []
    step = AdamW.step

    def counted(self: AdamW, *arguments: Any, **options: Any) -> Any:
        made.append(self)
        return step(self, *arguments, **options)

    monkeypatch.setattr(AdamW, "step", counted)
    return made
