"""Measure how long ``/livez`` takes while the engine is saturated.

    python -m benchmarks.liveness

Starts the real server on a free port, keeps more requests running than a tick has rows, and calls
``/livez`` at a steady rate. Prints the percentiles together with those of the idle server; the
limit is 50 ms at the 99th percentile.
"""

from __future__ import annotations

import argparse
import json
from statistics import quantiles
from threading import Event, Thread
from time import perf_counter, sleep
from typing import TYPE_CHECKING

from benchmarks.real_server import SERVE, served

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.real_server import Served

PACE_S = 0.02


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.liveness")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    with served(SERVE) as server:
        idle = _poll(server, options.seconds / 4)
        stop = Event()
        done = [0] * options.clients
        clients = [
            Thread(target=_keep_asking, args=(server, i, done, stop), daemon=True)
            for i in range(options.clients)
        ]
        for client in clients:
            client.start()
        sleep(2)
        busy = _poll(server, options.seconds)
        stop.set()
        for client in clients:
            client.join(60)
    print(f"{options.clients} clients, {sum(done)} images in {options.seconds:g} s")
    print("| server | polls | p50 ms | p99 ms | worst ms |")
    print("|---|---|---|---|---|")
    for name, times in (("idle", idle), ("saturated", busy)):
        print(f"| {name} | {len(times)} | {percentiles(times)} |")


def percentiles(times: Sequence[float]) -> str:
    """The 50th and 99th percentiles and the maximum, as cells of the table."""
    cuts = quantiles(times, n=100, method="inclusive")
    return f"{cuts[49]:.1f} | {cuts[98]:.1f} | {max(times):.1f}"


def _poll(server: Served, seconds: float) -> list[float]:
    """Milliseconds of each response, with a new connection for each request."""
    times: list[float] = []
    end = perf_counter() + seconds
    while perf_counter() < end:
        began = perf_counter()
        if server.ask("GET", "/livez")[0] != 200:
            raise RuntimeError("/livez did not answer 200")
        times.append(1000 * (perf_counter() - began))
        sleep(PACE_S)
    return times


def _keep_asking(server: Served, client: int, done: list[int], stop: Event) -> None:
    seed = 0
    while not stop.is_set():
        body = {"prompt": "a red circle", "seed": seed, "steps": 20, "guidance": "apg"}
        sent = json.dumps(body).encode()
        if server.ask("POST", "/v1/generate", sent, timeout_s=120)[0] == 200:
            done[client] += 1
        seed += 1


if __name__ == "__main__":
    main()
