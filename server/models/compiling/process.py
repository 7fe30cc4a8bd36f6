"""A compiling process, as seen from the server."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import torch

from server.models.compiling.worker import MAX_EXIT_S, main

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from server.models.compiling.program import BlockJob

__all__ = ["CompilingProcess"]

METHOD: Final = "spawn"
"""A forked child of a process that uses CUDA cannot use CUDA."""

MAX_COMPILE_S: Final = 900.0
"""Maximum seconds for one block."""


class CompilingProcess:
    """Compiles one block after another; started on demand, and restarted if it has ended.

    It belongs to one thread, which must outlive it: the process ends with the thread.

    Args:
        folder: folder for the temporary files of compilers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: tuple[BaseProcess, Connection] | None = None

    def compile(self, job: BlockJob, file: Path) -> dict[str, Any] | None:
        """Compile a block; the result has the form described in ``worker.main``.

        Args:
            job: block to compile.
            file: path of the program to write.

        Returns:
            None if the process ended or took too long, in which case it has been ended.

        Raises:
            Exception: the block cannot be pickled and sent; the process is not affected.
        """
        if self._running is None:
            self._running = self._started()
        _, connection = self._running
        try:
            connection.send((job, str(file), torch.get_num_threads()))
            if not connection.poll(MAX_COMPILE_S):
                raise TimeoutError
            return json.loads(connection.recv())
        except (EOFError, OSError):
            self._end(0)
            return None

    def end(self) -> None:
        """End the process because there is nothing left to do, and wait until it has ended."""
        self._end(MAX_EXIT_S)

    def _started(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context(METHOD)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=main, args=(theirs, self._folder), name="weft-compile", daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def _end(self, patience_s: float) -> None:
        """End the process, giving it time to exit by itself, and the compilers it has started."""
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        connection.close()
        process.join(patience_s)
        if process.pid is None or not process.is_alive():
            return
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
