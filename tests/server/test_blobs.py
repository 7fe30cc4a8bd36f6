"""Files of a place that several servers write to, on a disk that may be full."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from server.blobs import Blobs


def test_two_servers_may_delete_the_same_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = os.remove

    def late(path: str) -> None:
        """As if the other server had been faster by a moment."""
        remove(path)
        remove(path)

    names = ["one.png", "another.png"]
    for name in names:
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", late)
        asyncio.run(Blobs(str(tmp_path)).delete(names))
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        asyncio.run(Blobs(str(tmp_path)).write("taken", b"a picture"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
