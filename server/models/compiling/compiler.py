"""Compiles blocks in the background, in a process of its own, and keeps the programs in a folder.

One process compiles one block after another. It ends when there is nothing to do, and so does the
thread that waits for it. The compiled programs stay, for this machine and these versions.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections import deque
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from platform import machine
from shutil import which
from threading import Lock, Thread
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from server.models.compiling.worker import main

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from torch import Tensor

    from server.models.compiling.program import BlockJob

    Program = Callable[..., Sequence[Tensor]]
    Told = Callable[[Program | None, str], None]

__all__ = ["BlockCompiler", "key_of", "missing_compiler"]

log = logging.getLogger("weft")

LONGEST_S = 900.0
"""For one block."""

MEASURED_AGAIN_S = 3600.0
MOST_MEASUREMENTS = 3
"""What seemed to gain nothing may have been measured on a busy machine: it is measured again at a
later start, so often in all."""


class _Asked(NamedTuple):
    """A block that is to be compiled; see :meth:`BlockCompiler.ask`."""

    job: BlockJob
    identity: str
    tell: Told
    wanted: Callable[[], bool]


FOR_LOADING = "torch._functorch._aot_autograd.autograd_cache", "torch._inductor.compile_fx"


def missing_compiler() -> str | None:
    """Why nothing can be compiled here, as a clause; None if there is a C++ compiler."""
    name = os.environ.get("CXX", "g++")
    return None if which(name) else f"there is no C++ compiler {name!r}; install it, or set CXX"


class BlockCompiler:
    """Compiles blocks of all models of a server; safe from any thread.

    Args:
        folder: for the programs; made if it is not there. Whoever can write there can make the
            server run what he likes, so nobody else is given the right.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        # Where inductor keeps what programs are made of: the process that compiles writes there,
        # and this one loads from there.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        # No processes below the one that compiles, which would outlive it.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        (folder / "inductor").mkdir(exist_ok=True)
        # What loading a program needs takes seconds to import, which no tick is to wait for.
        for module in FOR_LOADING:
            import_module(module)
        self._lock = Lock()
        self._jobs: deque[_Asked] = deque()
        self._thread: Thread | None = None

    def ask(
        self, job: BlockJob, identity: str, tell: Told, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Have a block compiled.

        Args:
            job: what to compile.
            identity: equal for jobs of equal programs.
            tell: called in a thread of the compiler, with the program, or None and why there is
                none.
            wanted: whether anybody still waits for it when its turn has come; else nothing is done,
                and nobody is told.
        """
        with self._lock:
            self._jobs.append(_Asked(job, identity, tell, wanted))
            if self._thread is None:
                self._thread = Thread(target=self._run, name="weft-compile", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        connection: Connection | None = None
        try:
            while (next_job := self._next()) is not None:
                try:
                    connection = self._do(*next_job[:3], connection)
                except Exception as error:  # noqa: BLE001 - other blocks wait for this thread
                    next_job.tell(None, f"it cannot be sent to a compiler: {error}")
        finally:
            if connection is not None:
                connection.close()

    def _do(
        self, job: BlockJob, identity: str, tell: Told, connection: Connection | None
    ) -> Connection | None:
        """Answer one question; returns the connection to the process that compiles, if it lives."""
        file = self._folder / f"{key_of(identity, job.device)}.program"
        told = _read(file)
        if told is None or _may_gain(told, file):
            connection = connection or self._started()
            told = self._compiled(connection, job, file)
            if told is None:
                connection = None
                told = {"reason": "the process that compiled it ended or took too long"}
        self._hand_over(told, file, tell)
        return connection

    def _next(self) -> _Asked | None:
        with self._lock:
            while self._jobs:
                asked = self._jobs.popleft()
                if asked.wanted():
                    return asked
            self._thread = None
            return None

    def _started(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=main, args=(theirs,), name="weft-compile", daemon=True)
        process.start()
        theirs.close()
        self._process = process
        return ours

    def _compiled(self, connection: Connection, job: BlockJob, file: Path) -> dict[str, Any] | None:
        """What the process says of a block; None if it says nothing, and has been ended."""
        try:
            connection.send((job, str(file), torch.get_num_threads()))
            if not connection.poll(LONGEST_S):
                raise TimeoutError
            told: dict[str, Any] = json.loads(connection.recv())
        except (EOFError, OSError):
            connection.close()
            _end(self._process)
            return None
        if "reason" not in told or told["lasting"]:
            before = _read(file) or {}
            measured = {"measurements": before.get("measurements", 0) + 1}
            _note(file).write_text(json.dumps(told | measured))
        return told

    def _hand_over(self, told: dict[str, Any], file: Path, tell: Told) -> None:
        if "reason" in told:
            tell(None, told["reason"])
            return
        try:
            program = _loaded(file)
        except Exception as error:  # noqa: BLE001 - a damaged file must not end the thread
            _note(file).unlink(missing_ok=True)
            tell(None, f"its program cannot be loaded: {error}")
            return
        tell(program, f"{told['program_ms']:.2f} ms in place of {told['block_ms']:.2f}")


def _loaded(file: Path) -> Program:
    from torch._inductor import CompiledArtifact

    return CompiledArtifact.load(path=str(file), format="binary")


def _note(file: Path) -> Path:
    """Beside a program, what was measured of it, or why there is none."""
    return file.with_suffix(".json")


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(_note(file).read_text())
    except (OSError, ValueError):
        return None


def _may_gain(told: dict[str, Any], file: Path) -> bool:
    """Whether a program that seemed to gain nothing is to be measured again."""
    if not told.get("slow") or told.get("measurements", 1) >= MOST_MEASUREMENTS:
        return False
    return time() - _note(file).stat().st_mtime > MEASURED_AGAIN_S


def key_of(identity: str, device: str) -> str:
    """The name of a program on this machine, and by these versions of what compiled it."""
    place = torch.device(device)
    if place.type == "cuda":
        where = (device, torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))
    else:
        where = (machine(), _instructions(), torch.get_num_threads())
    versions = torch.__version__, version("diffusers")
    return sha256(repr((identity, where, versions)).encode()).hexdigest()


def _instructions() -> str:
    """Those of the CPU, as programs use all that there are."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return torch.backends.cpu.get_cpu_capability()


def _end(process: BaseProcess | None) -> None:
    """End a process, and the compilers that it has started."""
    if process is None or process.pid is None or not process.is_alive():
        return
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
