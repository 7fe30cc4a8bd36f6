"""Forward passes that run out of memory, and their effect on all other images."""

from __future__ import annotations

import io
import json
import os
import signal
from base64 import b64decode
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from benchmarks.promises.answers import CANARY
from benchmarks.promises.costs import grown
from benchmarks.promises.promise import Outcome, Promise
from benchmarks.promises.short_of_memory import FAULTS, NEVER, REPORT
from benchmarks.real_server import MIB, served

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.real_server import Served

__all__ = ["PROMISES"]

SHORT: Final = ("-m", "benchmarks.promises.short_of_memory")
AT_ONCE: Final = 8
SIZES: Final = sorted(product(range(32, 256, 32), repeat=2), key=prod)[:24]
"""Sizes in pixels. Each has its own largest forward pass, which shrinks when memory runs out."""

ROUNDING: Final = 1
"""Tolerance in levels of 255, as forward passes with other numbers of rows round differently."""

LEFT_BYTES: Final = 32 * MIB


def _survives(_: Served, options: tuple[str, ...] = ()) -> Outcome:
    """Compare the same images before and during a hundred faults."""
    with served([*SHORT, *options, "--row-budget", str(AT_ONCE)]) as server:
        before = {size: _images(server, *size) for size in SIZES}
        memory = server.resident()
        os.kill(server.process, signal.SIGUSR1)
        wrong = made = 0
        for size in SIZES:
            images = _images(server, *size)
            made += AT_ONCE
            wrong += AT_ONCE - sum(map(_equal, before[size], images))
            if _faults(server) == FAULTS:
                break
        faults, left = _faults(server), server.resident() - memory
        alive = server.ask("GET", "/readyz")[0] == 200
    figure = (
        f"{wrong} of {made} images lost or changed by {faults} faults, memory {grown(left)}, "
        f"{'ready' if alive else 'not ready'} after"
    )
    return Outcome(figure, wrong == 0 and faults == FAULTS and left < LEFT_BYTES and alive)


def _images(server: Served, width: int, height: int) -> list[NDArray[np.int16]]:
    status, _, content = server.generate(
        width=width, height=height, n=AT_ONCE, steps=2, guidance="none"
    )
    if status != 200:
        return []
    encoded = [b64decode(one["b64_json"]) for one in json.loads(content)["images"]]
    return [np.asarray(Image.open(io.BytesIO(one)), dtype=np.int16) for one in encoded]


def _equal(one: NDArray[np.int16], other: NDArray[np.int16]) -> bool:
    return bool(np.abs(one - other).max() <= ROUNDING)


def _faults(server: Served) -> int:
    return server.log.read_text().splitlines().count(REPORT)


def _private(_: Served, options: tuple[str, ...] = ()) -> Outcome:
    """Search for a canary after requests that fail for lack of memory."""
    fields: dict[str, Any] = {"width": NEVER, "height": NEVER}
    with served([*SHORT, *options]) as server:
        answers = [
            server.generate(prompt=CANARY, **fields),
            server.generate(prompt="x", negative_prompt=CANARY, n=2, **fields),
            server.generate(prompt=CANARY, stream=True, **fields),
        ]
        output = server.log.read_text() + server.ask("GET", "/metrics")[2].decode()
    failed = sum(b"memory" in content for _, _, content in answers)
    hits = output.count(CANARY)
    figure = f"{hits} found after {failed} of {len(answers)} that failed"
    return Outcome(figure, hits == 0 and failed == len(answers))


PROMISES: Final = (
    Promise(
        "Running out of memory is survived.",
        f"{AT_ONCE} images at once of each of up to {len(SIZES)} sizes, while {FAULTS} "
        "forwards of several rows run out of memory",
        f"every image as without the faults (within {ROUNDING} of 255), memory less than "
        f"+{LEFT_BYTES // MIB} MB, ready after",
        "an error of memory ends all images of its tick",
        _survives,
        partial(_survives, options=("--weak",)),
    ),
    Promise(
        "Prompts stay private when memory runs out.",
        "a canary in the prompts of 3 requests that do not fit; searched for in the log and the "
        "metrics",
        "0 found",
        "requests written to the log",
        _private,
        partial(_private, options=("--weak",)),
    ),
)
