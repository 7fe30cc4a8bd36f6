"""Fixtures for the studies, whose plots take most of the time to render."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.server.thin_model import save_thin_model


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


@pytest.fixture(scope="session")
def thin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with thin networks of random weights, where pictures need show nothing."""
    folder = tmp_path_factory.mktemp("thin") / "model"
    save_thin_model(folder)
    return folder
