from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from server.errors import InvalidRequest
from server.output_files import OutputFiles

IMAGES = [(7, b"one"), (8, b"two")]


def test_one_image_has_the_name_and_several_have_their_seeds(tmp_path: Path) -> None:
    files = OutputFiles(tmp_path / "x.webp", force=False)
    assert files.output_format == "webp"
    assert files.write(IMAGES[:1]) == [tmp_path / "x.webp"]
    assert files.write(IMAGES) == [tmp_path / "x-7.webp", tmp_path / "x-8.webp"]
    assert (tmp_path / "x-8.webp").read_bytes() == b"two"


@pytest.mark.parametrize(("name", "seed", "count"), [("x.png", None, 1), ("x-8.png", 7, 2)])
def test_a_file_that_exists_is_refused_before_the_work(
    tmp_path: Path, name: str, seed: int | None, count: int
) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(InvalidRequest, match=r"which exists; choose another, or pass --force"):
        OutputFiles(tmp_path / "x.png", force=False).check(seed, count)
    OutputFiles(tmp_path / "x.png", force=True).check(seed, count)
    OutputFiles(tmp_path / "y.png", force=False).check(seed, count)


def test_a_file_that_came_meanwhile_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    with pytest.raises(InvalidRequest, match="which exists"):
        OutputFiles(path, force=False).write(IMAGES[:1])
    assert path.read_bytes() == b"old"
    OutputFiles(path, force=True).write(IMAGES[:1])
    assert path.read_bytes() == b"one"


def test_a_disk_that_is_full_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def full(fresh: Path, data: bytes) -> int:
        with fresh.open("wb") as stream:
            stream.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InvalidRequest, match="cannot be written: No space left on device"):
        OutputFiles(path, force=True).write(IMAGES[:1])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by the folder's mode, which root may ignore.
    monkeypatch.setattr(os, "access", lambda folder, _: folder != tmp_path)
    with pytest.raises(InvalidRequest, match="but that folder cannot be written to"):
        OutputFiles(tmp_path / "x.png", force=False)
