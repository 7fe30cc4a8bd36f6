"""A file has either the old or the new content, and its mode follows the umask."""

import stat
from pathlib import Path

from samplers.whole_file import write_whole


def test_the_folder_and_the_file_are_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "numbers.safetensors"
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_the_mode_is_the_umasks_whatever_a_stopped_run_left(
    tmp_path: Path, mode_of_files: int
) -> None:
    file = tmp_path / "numbers"
    (tmp_path / ".numbers.writing").touch(0o600)
    write_whole(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == mode_of_files
    # Also when it replaces a file that others could not read.
    file.chmod(0o600)
    write_whole(file, b"newer")
    assert stat.S_IMODE(file.stat().st_mode) == mode_of_files


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    write_whole(file, b"the old one")
    with file.open("rb") as reading:
        assert reading.read(4) == b"the "
        write_whole(file, b"another")
        assert reading.read() == b"old one"
    assert file.read_bytes() == b"another"
