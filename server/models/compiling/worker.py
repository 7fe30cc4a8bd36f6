"""The compiling process, apart from the server because tracing would hold its GIL during ticks."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import warnings
from contextlib import nullcontext, suppress
from ctypes import CDLL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from server.models.compiling.program import (
    BlockJob,
    NotCompilable,
    NotFaster,
    check,
    compile_to,
    draw_weights,
    export,
)
from server.models.compiling.turns import alone, beside_others

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["main"]

REASON_LENGTH = 200

MAX_EXIT_S = 5

TURNS = "turns"
"""Lock file in the programs' folder, by which processes take turns at timing."""

PARENT_DEATH_SIGNAL = 1
"""Linux's ``PR_SET_PDEATHSIG``; on other systems the process ends after its current job."""


def main(jobs: Connection, folder: Path) -> None:
    """Compile blocks on request until the server closes the connection.

    Args:
        jobs: connection to the server; see below.
        folder: folder for the temporary files of compilers. In a world-writable folder such as
            ``/tmp``, another user could place headers that would be compiled.

    A job is a :class:`BlockJob`, the path of its program and the number of threads of one operation
    on a CPU. The answer is JSON: ``block_ms`` and ``program_ms``; or ``reason``, a clause that says
    why there is no program, ``lasting``, whether the reason is permanent, and ``slow``, whether the
    reason is that the program is not faster.
    """
    # Ctrl-C is for the server. This process ends with it, as do the compilers that it started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    signal.signal(signal.SIGTERM, _end_all)
    with suppress(OSError, AttributeError):
        CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    # The server's own threads have priority.
    os.nice(10)
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(folder)
    while True:
        try:
            job, file, threads = jobs.recv()
        except EOFError:
            return
        # Compiled loops are divided among the number of threads set at compile time.
        torch.set_num_threads(threads)
        jobs.send(_compiled(job, Path(file)))


def _end_all(*_: object) -> None:
    """End the compilers below this process, and then this process by a regular exit.

    Killing it at once would leave behind a half-written program and the semaphores that it holds.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    # If a compiler catches the exit or takes long to reach it, the alarm ends this process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MAX_EXIT_S)
    sys.exit()


def _compiled(job: BlockJob, file: Path) -> str:
    partial = file.with_suffix(f".{os.getpid()}")
    answer: dict[str, Any] = {}
    try:
        with torch.no_grad():
            block_s, program_s = _measured(job, partial)
        answer = {"block_ms": 1000 * block_s, "program_ms": 1000 * program_s}
        partial.replace(file)
    except NotCompilable as error:
        answer = {"reason": str(error), "lasting": True, "slow": isinstance(error, NotFaster)}
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"[:REASON_LENGTH]
        answer = {"reason": reason, "lasting": False}
    finally:
        partial.unlink(missing_ok=True)
        if torch.cuda.is_initialized():
            # The server may need this memory more than the next block does.
            torch.cuda.empty_cache()
    return json.dumps(answer)


def _measured(job: BlockJob, file: Path) -> tuple[float, float]:
    """Compile a block and check it; see :func:`check` for the returned values."""
    turns = file.with_name(TURNS)
    # Compilers run on the CPU, where they disturb timings; timings on a GPU are unaffected.
    with beside_others(turns) if torch.device(job.device).type == "cpu" else nullcontext():
        weights = draw_weights(job)
        program = compile_to(export(job, weights), file)
    with alone(turns):
        return check(job, program, weights)
