"""Compiles blocks in background processes, and keeps the programs in a folder.

Each process compiles one block after another. When there is nothing left to do, the processes and
the threads that wait for them end. Programs are kept for this machine and these library versions.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
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

from server.models.compiling.process import CompilingProcess
from server.models.compiling.room import has_room, max_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from server.models.compiling.program import BlockJob

    Program = Callable[..., Sequence[Tensor]]
    OnDone = Callable[[Program | None, str], None]

__all__ = ["BlockCompiler", "key_of", "missing_compiler"]

log = logging.getLogger("weft")

REMEASURE_AFTER_S = 3600.0
MAX_MEASUREMENTS = 3
"""A program that seemed to gain nothing may have been timed on a busy machine. It is timed again
at a later start, at least ``REMEASURE_AFTER_S`` seconds later, up to this many times in all."""


class _Asked(NamedTuple):
    """A block to be compiled; see :meth:`BlockCompiler.ask`."""

    job: BlockJob
    identity: str
    on_done: OnDone
    wanted: Callable[[], bool]

    @property
    def program(self) -> tuple[str, str]:
        """Equal for requests that the same program answers."""
        return self.identity, self.job.device


FOR_LOADING = "torch._functorch._aot_autograd.autograd_cache", "torch._inductor.compile_fx"


def missing_compiler() -> str | None:
    """Why nothing can be compiled here, as a clause; None if there is a C++ compiler."""
    name = os.environ.get("CXX", "g++")
    return None if which(name) else f"there is no C++ compiler {name!r}; install it, or set CXX"


class BlockCompiler:
    """Compiles blocks of all models of a server; safe from any thread.

    Args:
        folder: folder for the programs. If it does not exist, it is created with access only for
            its owner, as anybody who can write there can make the server run arbitrary code.
        processes: maximum number of processes that compile at once; by default chosen from the
            number of cores.

    Raises:
        OSError: the folder cannot be created or written to.
    """

    def __init__(self, folder: Path, processes: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        # Inductor's cache of compiled kernels: the compiling process writes there, and this process
        # loads from there.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        # No subprocesses of the compiling process, which would outlive it.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        (folder / "inductor").mkdir(exist_ok=True)
        # These modules take seconds to import, and no tick of the engine should wait for that.
        for module in FOR_LOADING:
            import_module(module)
        self._lock = Lock()
        self._loading = Lock()
        self._jobs: deque[_Asked] = deque()
        self._at_work: set[tuple[str, str]] = set()
        self._threads = 0
        self._max_processes = max_processes() if processes is None else processes
        self._processes = 0
        # At exit, do not start a process to replace one that has been ended.
        atexit.register(self._jobs.clear)

    def ask(
        self,
        job: BlockJob,
        identity: str,
        on_done: OnDone,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Queue a block for compilation.

        Args:
            job: block to compile.
            identity: equal for jobs that lead to the same program.
            on_done: called in a compiler thread with the program, or with None and the reason why
                there is none.
            wanted: whether the program is still needed when its turn comes; if not, nothing is
                compiled and ``on_done`` is not called.
        """
        with self._lock:
            self._jobs.append(_Asked(job, identity, on_done, wanted))
            if self._threads < self._max_processes:
                self._threads += 1
                Thread(target=self._run, name="weft-compile", daemon=True).start()

    def _run(self) -> None:
        process: CompilingProcess | None = None
        while (asked := self._next(process)) is not None:
            file = self._folder / f"{key_of(asked.identity, asked.job.device)}.program"
            note = _known(file)
            if note is None and process is None and not self._claims_process(asked):
                return
            try:
                if note is None:
                    process = process or CompilingProcess(self._folder)
                    note = _compiled(process, asked.job, file)
                self._hand_over(note, file, asked.on_done)
            except Exception as error:  # noqa: BLE001 - other blocks wait for this thread
                asked.on_done(None, f"it cannot be sent to a compiler: {error}")
            self._at_work.discard(asked.program)
        if process is not None:
            process.end()

    def _next(self, process: CompilingProcess | None) -> _Asked | None:
        """The next block for a thread; None if there is none and the thread should end."""
        with self._lock:
            # A program that another thread is compiling is loaded afterwards, by that thread.
            while asked := next((o for o in self._jobs if o.program not in self._at_work), None):
                self._jobs.remove(asked)
                if asked.wanted():
                    self._at_work.add(asked.program)
                    return asked
            self._threads -= 1
            self._processes -= process is not None
            return None

    def _claims_process(self, asked: _Asked) -> bool:
        """Whether a thread may start a process; if not, it leaves its block to others."""
        with self._lock:
            if self._processes and not has_room(torch.device(asked.job.device), self._processes):
                self._jobs.appendleft(asked)
                self._at_work.discard(asked.program)
                self._threads -= 1
                return False
            self._processes += 1
            return True

    def _hand_over(self, note: dict[str, Any], file: Path, on_done: OnDone) -> None:
        if "reason" in note:
            on_done(None, note["reason"])
            return
        try:
            # Loading changes global state of inductor.
            with self._loading:
                program = _loaded(file)
        except Exception as error:  # noqa: BLE001 - a damaged file must not end the thread
            _note(file).unlink(missing_ok=True)
            on_done(None, f"its program cannot be loaded: {error}")
            return
        on_done(program, f"{note['program_ms']:.2f} ms instead of {note['block_ms']:.2f}")


def _compiled(process: CompilingProcess, job: BlockJob, file: Path) -> dict[str, Any]:
    """Compile a block in a process, and write down the result if it is final."""
    note = process.compile(job, file)
    if note is None:
        return {"reason": "the process that compiled it ended or took too long"}
    if "reason" not in note or note["lasting"]:
        before = _read(file) or {}
        measured = {"measurements": before.get("measurements", 0) + 1}
        _note(file).write_text(json.dumps(note | measured))
    return note


def _loaded(file: Path) -> Program:
    from torch._inductor import CompiledArtifact

    return CompiledArtifact.load(path=str(file), format="binary")


def _note(file: Path) -> Path:
    """File beside a program with its timings, or the reason why there is no program."""
    return file.with_suffix(".json")


def _read(file: Path) -> dict[str, Any] | None:
    """Content of a note; None if it does not exist or is unusable."""
    try:
        note = json.loads(_note(file).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and _is_usable(note) else None


def _is_usable(note: dict[str, Any]) -> bool:
    """Whether the JSON has the form that this module writes."""
    if "reason" in note:
        says = isinstance(note["reason"], str)
    else:
        says = all(isinstance(note.get(name), float) for name in ("block_ms", "program_ms"))
    return says and isinstance(note.get("measurements", 1), int)


def _known(file: Path) -> dict[str, Any] | None:
    """Result noted for a block; None if the block should be compiled."""
    note = _read(file)
    return None if note is None or _may_gain(note, file) else note


def _may_gain(note: dict[str, Any], file: Path) -> bool:
    """Whether a program that seemed to gain nothing should be timed again."""
    if not note.get("slow") or note.get("measurements", 1) >= MAX_MEASUREMENTS:
        return False
    try:
        return time() - _note(file).stat().st_mtime > REMEASURE_AFTER_S
    except OSError:
        # Removed since it was read.
        return True


def key_of(identity: str, device: str) -> str:
    """File name of a program, specific to this machine and to the versions of the libraries."""
    place = torch.device(device)
    if place.type == "cuda":
        where = (device, torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))
    else:
        where = (machine(), _instructions(), torch.get_num_threads())
    versions = torch.__version__, version("diffusers")
    return sha256(repr((identity, where, versions)).encode()).hexdigest()


def _instructions() -> str:
    """Instruction sets of the CPU, all of which programs may use."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return torch.backends.cpu.get_cpu_capability()
