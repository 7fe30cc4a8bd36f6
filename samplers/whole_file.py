"""Files that are there whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in the place of what was there, at once: a reader finds the old or the new.

    Its mode is what the umask says. The files of safetensors' own ``save_file`` may be read by
    nobody but their owner, which serves no server that runs as somebody else.

    Args:
        path: of the file; its folder is made.
        content: all of it.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.writing")
    # What a stopped run left would keep the mode that it has.
    fresh.unlink(missing_ok=True)
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
