"""Stopping a busy server: the effect on its clients."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

from benchmarks.promises.promise import WEAK, Outcome, Promise
from benchmarks.real_server import SERVE, served

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.real_server import Served

    Answer = tuple[int, Mapping[str, str], bytes]

__all__ = ["PROMISES"]

GRACE_S: Final = 6.0
"""Grace time below the default, so that a measurement takes seconds."""

EXIT_S: Final = 2.0
"""Seconds for the interpreter to shut down on a machine with other load."""

PATIENCE_S: Final = 20.0

LONG: Final[dict[str, Any]] = {"steps": 200, "width": 128, "height": 128, "n": 1}
"""A request that takes longer than the grace time."""

PLAIN: Final = 4
STREAMS: Final = 3


def _drain(_: Served, arguments: tuple[str, ...] = SERVE) -> Outcome:
    settings = {"WEFT_DRAIN_S": str(GRACE_S), "WEFT_LAME_DUCK_S": "1"}
    with (
        served([*arguments, "--row-budget", "8"], **settings) as server,
        ThreadPoolExecutor(PLAIN + STREAMS) as threads,
    ):
        plain = [threads.submit(server.generate, **LONG) for _ in range(PLAIN)]
        streams = [threads.submit(server.generate, stream=True, **LONG) for _ in range(STREAMS)]
        until = monotonic() + GRACE_S
        while server.metric("weft_queue_images") < LONG["n"] * (PLAIN + STREAMS):
            if monotonic() > until:
                break
            sleep(0.05)
        os.kill(server.process, signal.SIGTERM)
        signalled = monotonic()
        late = _refused_by_a_lame_duck(server)
        ended = monotonic() - signalled if _ends(server, PATIENCE_S) else None
        refused = sum(_is_refusal(one.result()) for one in plain)
        closed = sum(_ends_with_an_error(one.result()) for one in streams)
    figure = (
        f"{refused} of {PLAIN} unfinished requests refused, {closed} of {STREAMS} streams ended by "
        f"an event, a new request {'refused' if late else 'not refused'}, "
        + ("still there" if ended is None else f"gone after {ended:.1f} s")
    )
    answered = (refused, closed, late) == (PLAIN, STREAMS, True)
    return Outcome(figure, answered and ended is not None and ended <= GRACE_S + EXIT_S)


def _refused_by_a_lame_duck(server: Served) -> bool:
    """Whether a request that arrives during shutdown is refused with Retry-After."""
    until = monotonic() + 1
    while server.ask("GET", "/readyz")[0] == 200 and monotonic() < until:
        sleep(0.02)
    answer = server.generate()
    return _is_refusal(answer) and "retry-after" in answer[1]


def _is_refusal(answer: Answer) -> bool:
    """Whether a response is a 503 in the usual error format."""
    status, _, content = answer
    with suppress(ValueError, KeyError, TypeError):
        return status == 503 and bool(json.loads(content)["error"]["message"])
    return False


def _ends_with_an_error(answer: Answer) -> bool:
    return answer[2].strip().rpartition(b"\n\n")[2].startswith(b"event: error\n")


def _ends(server: Served, within_s: float) -> bool:
    """Whether the process ends in time; it is a zombie until its parent reads its status."""
    until = monotonic() + within_s
    while monotonic() < until:
        if Path(f"/proc/{server.process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        sleep(0.05)
    return False


PROMISES: Final = (
    Promise(
        "A server that is told to stop leaves nobody without an answer.",
        f"SIGTERM while {PLAIN} requests and {STREAMS} streams of events are under way that would "
        f"take longer than the grace time of {GRACE_S:g} s, then a new request",
        "each refused with 503 in the form of all errors, or its stream ended by an `error` event; "
        f"gone within the grace time + {EXIT_S:g} s",
        "uvicorn's own reaction to the signal",
        _drain,
        partial(_drain, arguments=WEAK),
    ),
)
