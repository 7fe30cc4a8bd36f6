"""Atomic replacement of files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader finds either the old content or the new.

    The file's mode follows the umask. (Files of safetensors' own ``save_file`` are readable only by
    their owner, and so useless to a server that runs as another user.)

    Args:
        path: path of the file; its folder is created if needed.
        content: the whole content.

    Raises:
        OSError: the file cannot be written; the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.writing")
    # A file left by a stopped run would keep its mode.
    fresh.unlink(missing_ok=True)
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
