"""Fixtures for the studies, whose plots take most of the time to render."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The plots drawn, of which only the first is rendered; the others are empty files."""
    save, drawn = Figure.savefig, []

    def save_the_first(figure: Figure, path: Path, **options: Any) -> None:
        drawn.append(path)
        if len(drawn) == 1:
            save(figure, path, **options)
        else:
            path.touch()

    monkeypatch.setattr(Figure, "savefig", save_the_first)
    return drawn
