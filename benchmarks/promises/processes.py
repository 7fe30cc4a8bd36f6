"""Promises of the loaders and the engine, measured in processes without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from benchmarks.promises.promise import Outcome, Promise

if TYPE_CHECKING:
    from benchmarks.real_server import Served

__all__ = ["PROMISES"]

MIN_CASES: Final = 30
PATIENCE_S: Final = 600


def _printed(*arguments: str) -> dict[str, Any]:
    """The object that a module of this package prints."""
    module, *rest = arguments
    command = [sys.executable, "-m", f"benchmarks.promises.{module}", *rest]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE_S)
    return json.loads(done.stdout.splitlines()[-1])


def _hostile_files(_: Served, options: tuple[str, ...] = ()) -> Outcome:
    found = _printed("hostile_files", *options)
    figure = (
        f"{found['ran']} of {found['tried']} ran their code, {found['unexplained']} were not "
        "refused in a sentence"
    )
    kept = found["ran"] == found["unexplained"] == 0 and found["tried"] >= MIN_CASES
    return Outcome(figure, kept)


def _bad_rows(_: Served, options: tuple[str, ...] = ()) -> Outcome:
    found = _printed("rows", *options)
    figure = f"{found['spared']} of {found['runs']} batches spared the other seven"
    return Outcome(figure, found["spared"] == found["runs"] > 0)


PROMISES: Final = (
    Promise(
        "No code runs from a model folder or an adapter.",
        "9 kinds of hostile folders as each pipeline class that the loader takes, and adapters of "
        "6 kinds of files; each would make a file if its code ran",
        "0 run, each refused in one sentence",
        "a loader that unpickles and imports what it finds",
        _hostile_files,
        partial(_hostile_files, options=("--trusting",)),
    ),
    Promise(
        "A bad row never hurts its batch-mates.",
        "NaN in each row in turn of a batch of 8, by 3 samplers, in the engine",
        "that image fails by name, the 7 others are equal to the bit, and so is the next batch",
        "a model whose rows feel one another",
        _bad_rows,
        partial(_bad_rows, options=("--weak",)),
    ),
)
