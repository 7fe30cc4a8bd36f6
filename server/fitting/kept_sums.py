"""Sums over runs, kept in a file so that an interrupted command can resume."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from samplers.whole_file import write_whole

__all__ = ["KeptSums"]

log = logging.getLogger("weft")


class KeptSums:
    """The sums over the first runs of a command.

    Args:
        file: file that keeps them; None keeps nothing.
        description: everything that the sums depend on except the number of runs. Sums that were
            kept under another description are ignored.
    """

    def __init__(self, file: Path | None, description: str) -> None:
        self._file = file
        self._description = description

    def read(self, limit: int) -> tuple[int, NDArray[np.float64] | None]:
        """Return the number of runs summed up, at most `limit`, and their sums; else 0 and None."""
        if self._file is None or not self._file.exists():
            return 0, None
        try:
            with safe_open(self._file, "np") as content:
                metadata: dict[str, str] = content.metadata() or {}
                sums = content.get_tensor("sums")
            description, done = metadata["description"], int(metadata["runs"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s cannot be read, and its runs are made again: %s", self._file, error)
            return 0, None
        if description != self._description or done > limit:
            return 0, None
        return done, sums

    def keep(self, done: int, sums: NDArray[np.float64]) -> None:
        """Write the sums over the first `done` runs, completely or not at all."""
        if self._file is not None:
            metadata = {"description": self._description, "runs": str(done)}
            write_whole(self._file, save({"sums": sums}, metadata))

    def drop(self) -> None:
        """Remove the file, since nothing is left to do."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
