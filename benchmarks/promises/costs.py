"""The cost of one client to others: event loop, memory, connections and queue."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from statistics import quantiles
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Final

from benchmarks.promises.attackers import (
    BODIES,
    BOMBS,
    SLOW_PICTURE,
    TURN_S,
    attack,
    picture,
    request_with,
)
from benchmarks.promises.promise import Outcome, Promise
from benchmarks.real_server import MIB, Served

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

__all__ = ["PROMISES"]

ATTACKED_S: Final = (1 + len(BODIES)) * TURN_S
LIVEZ_S: Final = 0.050
BOMB_S: Final = 1.0
BOMB_BYTES: Final = 64 * MIB
UNFINISHED: Final = 20
HEADERS_S: Final = 2.0
WRITE_S: Final = 2.0
LARGE_FILE: Final = "/docs/swagger-ui-bundle.js"
UNREAD: Final = 16
"""Number of responses of over a megabyte, more than the system buffers for a client that does not
read."""

FULL_QUEUES: Final = 1.5
MARGIN_S: Final = 1.0
IDLE: Final = 100
"""Number of idle connections, more than the measured server accepts; see `SETTINGS`."""

SETTINGS: Final = {
    "WEFT_HEADERS_S": str(HEADERS_S),
    "WEFT_WRITE_S": str(WRITE_S),
    "WEFT_MAX_CONNECTIONS": "64",
    "WEFT_BODIES_BYTES": str(128 * MIB),
    "WEFT_MAX_PENDING": "16",
}
"""Limits below the defaults, so that a measurement takes seconds."""


def _event_loop(server: Served) -> Outcome:
    idle = [_paused(server) for _ in range(100)]
    times: list[float] = []
    with attack(server, list(BODIES), 2):
        until = monotonic() + ATTACKED_S
        while monotonic() < until:
            times.append(_paused(server))
    return delays(times, idle)


def delays(times: Sequence[float], idle: Sequence[float]) -> Outcome:
    """Whether the event loop responded in time.

    Args:
        times: seconds of `/livez` during the attack.
        idle: seconds of `/livez` before it.
    """
    at_99, before = (quantiles(one, n=100, method="inclusive")[98] for one in (times, idle))
    figure = (
        f"99th percentile {1000 * at_99:.0f} ms, longest {1000 * max(times):.0f} ms; before the "
        f"attack {1000 * before:.0f} ms"
    )
    return Outcome(figure, at_99 <= LIVEZ_S)


def _paused(server: Served) -> float:
    sleep(0.01)
    return server.livez_s()


def _bombs(server: Served) -> Outcome:
    # A valid picture is accepted; it also starts the decoding process.
    wrong = int(server.ask("POST", "/v1/generate", request_with(picture()))[0] != 200)
    before = server.resident()
    longest, most = 0.0, 0
    bodies = [request_with(bomb()) for bomb in BOMBS.values()]
    for body in bodies:
        began = perf_counter()
        status, _, _ = server.ask("POST", "/v1/generate", body)
        longest = max(longest, perf_counter() - began)
        most = max(most, server.resident() - before)
        wrong += status not in (413, 422)
    figure = f"{wrong} wrong answers, at most {longest:.2f} s, memory {grown(most)}"
    return Outcome(figure, wrong == 0 and longest < BOMB_S and most < BOMB_BYTES)


def _beside_uploads(server: Served) -> Outcome:
    """Time a request without a picture while others upload pictures that are slow to decode."""
    alone = sorted(_seconds_of_a_request(server) for _ in range(3))[1]
    with attack(server, [SLOW_PICTURE], 8):
        sleep(3)
        beside = _seconds_of_a_request(server)
    return Outcome(f"{beside:.2f} s, alone {alone:.2f} s", beside < 3 * alone + 0.5)


def _seconds_of_a_request(server: Served) -> float:
    began = perf_counter()
    server.generate()
    return perf_counter() - began


def _unfinished_bodies(server: Served) -> Outcome:
    before = server.resident()
    body = b'{"prompt": "x", "image": "' + b"A" * (30 * MIB)
    most = 0
    with ExitStack() as stack, ThreadPoolExecutor(UNFINISHED) as threads:
        clients = [stack.enter_context(server.connect()) for _ in range(UNFINISHED)]

        def hold(client: socket.socket) -> None:
            client.settimeout(5)
            with suppress(OSError):
                client.sendall(server.head("POST", "/v1/generate", 31 * MIB))
                client.sendall(body)

        sending = [threads.submit(hold, client) for client in clients]
        while not all(one.done() for one in sending):
            most = max(most, server.resident() - before)
            sleep(0.05)
        most = max(most, server.resident() - before)
    sleep(6)
    left = server.resident() - before
    figure = f"{grown(most)} while they send, {grown(left)} after"
    return Outcome(figure, most < 2 * 128 * MIB + 64 * MIB and left < 64 * MIB)


def grown(memory: int) -> str:
    """Format a change of memory given in bytes."""
    return f"{memory / MIB:+.0f} MB"


def _slow_clients(server: Served) -> Outcome:
    """Clients that send nothing, trickle headers, send endless headers, or do not read."""
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(4)]
        _silent, trickling, large, unread = clients
        unread.sendall(UNREAD * server.head("GET", LARGE_FILE, 0))
        trickling.sendall(b"GET /livez HTTP/1.1\r\n")
        with suppress(OSError):
            large.sendall(b"GET /livez HTTP/1.1\r\nx: " + b"y" * MIB)
        until = monotonic() + 3 * HEADERS_S
        while monotonic() < until:
            with suppress(OSError):
                trickling.sendall(b"x: y\r\n")
            sleep(0.1)
        ended = sum(_is_ended(client, 0.2) for client in clients)
    return Outcome(f"{ended} of 4 ended within {3 * HEADERS_S:g} s", ended == 4)


def _is_ended(client: socket.socket, within_s: float) -> bool:
    client.settimeout(within_s)
    try:
        while client.recv(65536):
            pass
    except (TimeoutError, BlockingIOError):
        return False
    except OSError:
        return True
    return True


def _idle_connections(server: Served) -> Outcome:
    """Count connections that the server keeps after more than it accepts, and send a request."""
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(IDLE)]
        status = server.ask("GET", "/livez", timeout_s=5)[0]
        opened = sum(not _is_ended(client, 0) for client in clients)
    figure = f"{opened} of {IDLE} idle connections kept, a request beside them: {status}"
    return Outcome(figure, opened <= 64 and status == 200)


def _overload(server: Served) -> Outcome:
    """Send six times as many requests at once as the queue accepts."""

    def ask(_: int) -> tuple[int, bool, float]:
        began = perf_counter()
        status, headers, _content = server.generate(steps=4)
        return status, "retry-after" in headers, perf_counter() - began

    with ThreadPoolExecutor(16) as threads:
        full = max(seconds for _, _, seconds in threads.map(ask, range(16)))
    with ThreadPoolExecutor(96) as threads:
        answers = list(threads.map(ask, range(96)))
    refused = [told for status, told, _ in answers if status == 429]
    slowest = max((seconds for status, _, seconds in answers if status == 200), default=0.0)
    broken = sum(status >= 500 or status == 0 for status, _, _ in answers)
    figure = (
        f"{len(refused)} of 96 refused with 429, {broken} errors, accepted within "
        f"{slowest:.1f} s; a full queue takes {full:.1f} s"
    )
    kept = (
        all(refused)
        and len(refused) > 0
        and broken == 0
        and slowest <= FULL_QUEUES * full + MARGIN_S
    )
    return Outcome(figure, kept)


def _vanishing_clients(server: Served) -> Outcome:
    body = b'{"prompt": "x", "steps": 200, "seed": 1}'
    with ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(server.connect())
            client.sendall(server.head("POST", "/v1/generate", len(body)) + body)
        until = monotonic() + 20
        while server.metric("weft_queue_images") < 8 and monotonic() < until:
            sleep(0.02)
    began = monotonic()
    while server.metric("weft_queue_images") > 0 and monotonic() < began + 5:
        sleep(0.01)
    seconds = monotonic() - began
    return Outcome(f"their images are gone after {seconds:.2f} s", seconds < 1)


PROMISES: Final = (
    Promise(
        "Memory for bodies is bounded, and returned.",
        f"{UNFINISHED} clients send 30 MB of a body and stop, then close; 128 MB are allowed "
        "together, and each byte counts twice while it is parsed",
        "at most +320 MB, and +64 MB after",
        "bodies read by FastAPI",
        _unfinished_bodies,
    ),
    Promise(
        "A client that is too slow is dropped.",
        "clients that send nothing, or headers that trickle or do not end, or that ask for "
        f"{UNREAD} large files and read nothing; {HEADERS_S:g} s are allowed",
        "4 of 4 ended",
        "uvicorn's own connections",
        _slow_clients,
    ),
    Promise(
        "Idle connections shut nobody out.",
        f"{IDLE} idle connections where 64 are allowed, then a request",
        "at most 64 kept, the request is answered",
        "uvicorn's own connections",
        _idle_connections,
    ),
    Promise(
        "Overload is refused, not queued without limit.",
        "96 requests at once where 16 images may wait",
        "the others get 429 with Retry-After, 0 errors; the accepted take at most "
        f"{FULL_QUEUES:g} x a full queue + {MARGIN_S:g} s",
        "a queue of 65,536 images",
        _overload,
    ),
    Promise(
        "Work for a client that has gone ends at once.",
        "8 clients that close their connection during 200 steps",
        "gone within 1 s",
        "nobody looks for clients that have gone",
        _vanishing_clients,
    ),
    Promise(
        "A hostile picture is refused by its header.",
        f"one usual picture, and {len(BOMBS)} small files that decode to something large or slow",
        "the usual one 200, each other 413 or 422 in less than 1 s, memory less than +64 MB",
        "no limits on scans and proportions, decoding in a thread",
        _bombs,
    ),
    Promise(
        "No body stops the event loop.",
        f"`/livez` while {len(BODIES)} kinds of hostile bodies of up to 30 MB are posted in turn, "
        "by two clients without pause",
        "99th percentile at most 50 ms",
        "bodies read and parsed by FastAPI",
        _event_loop,
    ),
    Promise(
        "Pictures that are slow to decode delay nobody else.",
        "a request without a picture beside 8 clients that post JPEGs of 2,000 scans",
        "less than 3 x alone + 0.5 s",
        "no limits on scans, decoding in a thread",
        _beside_uploads,
    ),
)
