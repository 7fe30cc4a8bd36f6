"""The image files that a command writes: checked before the work, written completely after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from samplers.whole_file import write_whole
from server.errors import InvalidRequest

__all__ = ["OutputFiles", "check_name"]

FORMATS: Final = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class OutputFiles:
    """Destination of the images of one request.

    Args:
        path: path of the file. If there are several images, their seeds are added to its name.
        force: whether to overwrite files that exist.

    Raises:
        InvalidRequest: the file's name has no known extension, or its folder cannot be written to.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self._path = path
        self._force = force
        suffix = path.suffix.lower()
        if suffix not in FORMATS:
            raise _refusal(path, f"; the file must end in one of: {', '.join(FORMATS)}")
        folder = path.absolute().parent
        if not os.path.isdir(folder):
            raise _refusal(path, ", but that folder does not exist")
        check_name("output", path)
        if path.is_dir():
            raise _refusal(path, ", which is a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _refusal(path, ", but that folder cannot be written to")
        self.output_format = FORMATS[suffix]

    def check(self, seed: int | None, count: int) -> None:
        """Refuse to overwrite files, if their names are known before the work.

        Raises:
            InvalidRequest: one of them exists.
        """
        if count == 1:
            self._check_free(self._path)
        elif seed is not None:
            for one in range(seed, seed + count):
                self._check_free(self._of(one))

    def write(self, images: Sequence[tuple[int, bytes]]) -> list[Path]:
        """Write images, each with its seed; every file is written completely or not at all.

        Raises:
            InvalidRequest: a file exists or cannot be written.
        """
        written: list[Path] = []
        for seed, data in images:
            path = self._path if len(images) == 1 else self._of(seed)
            self._check_free(path)
            try:
                write_whole(path, data)
            except OSError as error:
                raise _refusal(path, f", which cannot be written: {error.strerror}") from None
            written.append(path)
        return written

    def _of(self, seed: int) -> Path:
        return self._path.with_stem(f"{self._path.stem}-{seed}")

    def _check_free(self, path: Path) -> None:
        check_name("output", path)
        if path.exists() and not self._force:
            raise _refusal(path, ", which exists; choose another, or pass --force to overwrite it")


def check_name(option: str, path: Path) -> None:
    """Refuse a path that no file can have, before the work whose result it should hold.

    Args:
        option: name of the option, for the error message.
        path: path of the file.

    Raises:
        InvalidRequest: it is too long, or cannot be accessed.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        reason = f", which cannot be written: {error.strerror}"
        raise _refusal(path, reason, option) from None


def _refusal(path: Path, reason: str, option: str = "output") -> InvalidRequest:
    return InvalidRequest(option, f"{option} is {str(path)!r}{reason}.")
