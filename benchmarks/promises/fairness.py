"""Fairness of device time between two keys, and between large and small pictures."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles
from threading import Event
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, Final

from benchmarks.promises.promise import Outcome, Promise
from benchmarks.real_server import KEY, SERVE, served

if TYPE_CHECKING:
    from collections.abc import Generator

    from benchmarks.real_server import Served

__all__ = ["OTHER", "PROMISES"]

OTHER: Final = "another-key-with-an-equal-share"
FLOOD: Final = 10
"""Number of requests that one key keeps in flight while the other sends one at a time."""

STEPS: Final = 8
ONE: Final[dict[str, Any]] = {"steps": STEPS, "width": 64, "height": 64, "guidance": "cfg"}
SAMPLES: Final = 12
SLOWER: Final = 2.0
EQUAL: Final = 0.9
SHARED_S: Final = 8.0
LARGE: Final = {"n": 8, "steps": 6, "width": 192, "height": 192, "guidance": "cfg"}
SMALL: Final[dict[str, Any]] = {"steps": 4, "width": 64, "height": 64, "guidance": "cfg"}
TRIES: Final = 3
TICKS: Final = 2
IN_ORDER: Final = (
    "-c",
    "from benchmarks.promises import weak; from server.cli import main; weak.serve_in_order(); "
    "main()",
    "serve",
)
"""Arguments to Python for a server that lacks only fairness."""

TURNS: Final = 4
TURN_S: Final = 1.5
OF_IN_ORDER: Final = 0.92


def _one_at_a_time(server: Served) -> Outcome:
    """Latency of the requests of one key during a flood by another."""
    alone = _p95(server)
    with _flood(server, KEY, FLOOD, **ONE):
        beside = _p95(server)
    figure = f"{beside:.2f} s, alone {alone:.2f} s: {beside / alone:.2f} x"
    return Outcome(figure, beside <= SLOWER * alone)


def _p95(server: Served) -> float:
    times: list[float] = []
    for _ in range(SAMPLES):
        began = perf_counter()
        _post(server, OTHER, **ONE)
        times.append(perf_counter() - began)
    return quantiles(times, n=20, method="inclusive")[-1]


def _equal_shares(server: Served) -> Outcome:
    """Device seconds of two keys that always have work, of very different sizes."""
    before = _device_seconds(server)
    with (
        _flood(server, KEY, 8, steps=2, width=64, height=64),
        _flood(server, OTHER, 3, steps=STEPS, n=2, width=192, height=192),
    ):
        sleep(SHARED_S)
        after = _device_seconds(server)
    had = [after.get(name, 0.0) - before.get(name, 0.0) for name in ("key-1", "key-2")]
    index = sum(had) ** 2 / (2 * sum(one**2 for one in had)) if any(had) else 0.0
    figure = f"{had[0]:.1f} s and {had[1]:.1f} s, Jain's index {index:.3f}"
    return Outcome(figure, index >= EQUAL)


def _device_seconds(server: Served) -> dict[str, float]:
    text = server.ask("GET", "/metrics")[2].decode()
    found = re.findall(r'^weft_device_seconds_total\{key="([^"]*)"\} (\S+)', text, re.MULTILINE)
    return {name: float(seconds) for name, seconds in found}


def _large_beside_small(server: Served) -> Outcome:
    """Ticks given to others while a small picture is made together with large ones of its key."""
    others = [_ticks_beside(server) for _ in range(TRIES)]
    figure = f"{median(others):g} ticks of others, at most {max(others)}"
    return Outcome(figure, median(others) <= TICKS)


def _ticks_beside(server: Served) -> int:
    with ThreadPoolExecutor(1) as threads:
        before = server.metric("weft_tick_rows_count")
        large = threads.submit(_post, server, KEY, **LARGE)
        while server.metric("weft_tick_rows_count") == before and not large.done():
            sleep(0.005)
        began = server.metric("weft_tick_rows_count")
        _post(server, KEY, **SMALL)
        ticks = server.metric("weft_tick_rows_count") - began
        large.result()
    return round(ticks) - SMALL["steps"]


def _throughput(_: Served, budget: str = "16") -> Outcome:
    """Evaluations of two floods, alternating between a fair server and one that serves in order."""
    keys = {"WEFT_API_KEYS": f"{KEY},{OTHER}"}
    with (
        served([*SERVE, "--row-budget", budget], **keys) as fair,
        served([*IN_ORDER, "--row-budget", "16"], **keys) as in_order,
    ):
        rates: dict[int, list[float]] = {fair.port: [], in_order.port: []}
        for turn in range(2 * TURNS):
            # The order within pairs alternates, so that a slowdown of the machine favors neither.
            server = (fair, in_order)[(turn + turn // 2) % 2]
            with _flood(server, KEY, FLOOD, **ONE), _flood(server, OTHER, FLOOD, **ONE):
                began, before = perf_counter(), server.metric("weft_tick_rows_sum")
                sleep(TURN_S)
                rows = server.metric("weft_tick_rows_sum") - before
                rates[server.port].append(rows / (perf_counter() - began))
    shared, ordered = (median(one) for one in rates.values())
    figure = (
        f"{shared:.0f} evaluations a second, {ordered:.0f} in order of arrival: "
        f"{shared / ordered:.2f} x"
    )
    return Outcome(figure, shared >= OF_IN_ORDER * ordered)


@contextmanager
def _flood(server: Served, key: str, at_once: int, **fields: Any) -> Generator[None]:
    """Keep ``at_once`` requests of a key in flight."""
    ended = Event()

    def post_again() -> None:
        while not ended.is_set():
            _post(server, key, **fields)

    with ThreadPoolExecutor(at_once) as threads:
        for _ in range(at_once):
            threads.submit(post_again)
        sleep(1)
        try:
            yield
        finally:
            ended.set()


def _post(server: Served, key: str, **fields: Any) -> int:
    body = {"prompt": "a red circle", "steps": 2, "seed": 1} | fields
    headers = {"authorization": f"Bearer {key}"}
    content = json.dumps(body).encode()
    return server.ask("POST", "/v1/generate", content, headers, timeout_s=300)[0]


PROMISES: Final = (
    Promise(
        "A flood of one key does not hold up another.",
        f"95th percentile of {SAMPLES} requests of 64 x 64 pixels in {STEPS} steps, one by one, "
        f"alone and while another key keeps {FLOOD} such requests under way",
        f"at most {SLOWER:g} x alone",
        "first come, first served",
        _one_at_a_time,
    ),
    Promise(
        "Keys that always have work have equal seconds of the device.",
        "one key with 8 requests under way of 64 x 64 pixels and 2 steps, another with 3 of two "
        f"images, 192 x 192 pixels and {STEPS} steps, for {SHARED_S:g} s",
        f"Jain's index of fairness at least {EQUAL:g}",
        "first come, first served",
        _equal_shares,
    ),
    Promise(
        "Fairness costs little throughput.",
        f"evaluations while two keys keep {FLOOD} requests each under way, of 64 x 64 pixels in "
        f"{STEPS} steps, on this server and on one that serves in order of arrival; {TURNS} turns "
        f"of {TURN_S:g} s each, alternating, the medians",
        f"at least {OF_IN_ORDER:g} x",
        "two rows in a forward",
        _throughput,
        partial(_throughput, budget="2"),
    ),
    Promise(
        "A large picture does not hold up a small one.",
        f"ticks of others while an image of 64 x 64 pixels is made in {SMALL['steps']} steps, from "
        "its request to its answer, beside a request of the same key for 8 of 192 x 192 in 6 "
        f"steps; the median of {TRIES} tries",
        f"at most {TICKS}",
        "first come, first served",
        _large_beside_small,
    ),
)
