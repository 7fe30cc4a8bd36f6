"""The process that compiles: tracing and compiling would take Python's lock from the ticks."""

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
    NoGain,
    Unsuitable,
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

LONGEST_EXIT_S = 5

TURNS = "turns"
"""File in the folder of the programs, by which processes take turns at measuring."""

PARENT_DEATH_SIGNAL = 1
"""Linux's ``PR_SET_PDEATHSIG``; elsewhere this process ends with its job."""


def main(jobs: Connection, folder: Path) -> None:
    """Compile what is asked for, until nobody can ask any more.

    Args:
        jobs: see below.
        folder: for what compilers keep. Where all users may write, as in ``/tmp``, another one
            could lay down headers that are compiled.

    A job is a :class:`BlockJob`, the path of its program and the threads of one operation on a CPU.
    The answer is JSON: ``block_ms`` and ``program_ms``, or ``reason``, a clause that says why there
    is no program, ``lasting``, whether that is so for good, and ``slow``, whether that is because
    it gains no time.
    """
    # Ctrl-C is the server's. This process ends with it, and so do the compilers that it started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    signal.signal(signal.SIGTERM, _end_all)
    with suppress(OSError, AttributeError):
        CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    # The server's own threads go first.
    os.nice(10)
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(folder)
    while True:
        try:
            job, file, threads = jobs.recv()
        except EOFError:
            return
        # Loops are divided among as many as there are while they are compiled.
        torch.set_num_threads(threads)
        jobs.send(_compiled(job, Path(file)))


def _end_all(*_: object) -> None:
    """End the compilers below this process, and this process by way of what it does at its exit.

    Killed at once, it would leave a half-written program and any semaphores that it holds.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    # Should a compiler catch the exit, or take long to reach it, the system ends this process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST_EXIT_S)
    sys.exit()


def _compiled(job: BlockJob, file: Path) -> str:
    partial = file.with_suffix(f".{os.getpid()}")
    answer: dict[str, Any] = {}
    try:
        with torch.no_grad():
            block_s, program_s = _measured(job, partial)
        answer = {"block_ms": 1000 * block_s, "program_ms": 1000 * program_s}
        partial.replace(file)
    except Unsuitable as error:
        answer = {"reason": str(error), "lasting": True, "slow": isinstance(error, NoGain)}
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"[:REASON_LENGTH]
        answer = {"reason": reason, "lasting": False}
    finally:
        partial.unlink(missing_ok=True)
        if torch.cuda.is_initialized():
            # The server may need it more than the next block.
            torch.cuda.empty_cache()
    return json.dumps(answer)


def _measured(job: BlockJob, file: Path) -> tuple[float, float]:
    """Compile a block; see :func:`check` for what is returned."""
    turns = file.with_name(TURNS)
    # Compilers run on the CPU. They disturb what is measured there, and nothing on a GPU.
    with beside_others(turns) if torch.device(job.device).type == "cpu" else nullcontext():
        weights = draw_weights(job)
        program = compile_to(export(job, weights), file)
    with alone(turns):
        return check(job, program, weights)
