"""A server that is told to stop is a lame duck first, and leaves no client without an answer."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.http import drain
from server.http.drain import RESPONSE_GRACE_S, DrainingServer
from server.service.service import Service
from server.settings import Settings
from tests.covering import EVERY_CELL
from tests.server.process import PATIENCE_S, Forks, Server, served


def held(seconds: float) -> str:
    """A change by which a forward waits for a file, and takes some seconds even then."""
    return f"""
        while not flag.with_name("go").exists():
            time.sleep(0.01)
        time.sleep({seconds})
    """


def body(steps: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "steps": steps, "guidance": "none", **fields}


def half_a_request(server: Server) -> socket.socket:
    """A connection whose body has not all arrived."""
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
    head = (
        f"POST /v1/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    connection.sendall(head.encode())
    return connection


def test_requests_under_way_finish_or_hear_why_not(
    forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So long that only a second signal ends what is in progress.
    monkeypatch.setenv("WEFT_DRAIN_S", f"{2 * PATIENCE_S}")
    with served(forks, tmp_path, held(0.1)) as server:
        server.wait_for("/readyz", 200)
        server.disturb()
        _stop_amid_work(server, tmp_path / "go")
    assert "Traceback" not in server.log.read_text()


def _stop_amid_work(server: Server, go: Path) -> None:
    with ThreadPoolExecutor(4) as pool, half_a_request(server) as half:

        def ask(*given: Any) -> Future[tuple[int, str]]:
            return pool.submit(server.ask, *given)

        short = ask("/v1/generate", body(2))
        long = ask("/v1/generate", body(200))
        stream = ask("/v1/generate", body(200, stream=True))
        _wait(lambda: "weft_queue_images 3.0" in server.ask("/metrics")[1])
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("/readyz", 503)
        assert server.ask("/livez")[0] == 200
        status, refusal = server.ask("/v1/generate", body(1))
        assert (status, json.loads(refusal)["error"]["code"]) == (503, "not_ready")
        assert not short.done(), "the listener was to stay open while work goes on"

        go.touch()
        assert short.result()[0] == 200, (short.result(), server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
        status, unfinished = long.result()
        assert (status, json.loads(unfinished)["error"]["code"]) == (503, "not_ready")
        assert "server is stopping" in json.loads(unfinished)["error"]["message"]
        events = stream.result()[1].strip().split("\n\n")
        assert events[-1].startswith("event: error\n")
        assert "server is stopping" in events[-1]
        assert half.recv(12) == b"HTTP/1.1 503"
        assert server.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM][0 if EVERY_CELL else 1 :])
def test_a_server_that_is_still_loading_ends_cleanly(
    forks: Forks, tmp_path: Path, number: int
) -> None:
    with served(forks, tmp_path, held(2)) as server:
        server.disturb()
        server.wait_for("/livez", 200)
        server.wait_for("/readyz", 503)
        server.process.send_signal(number)
        (tmp_path / "go").touch()
        assert server.ended() == 0
    assert "Traceback" not in server.log.read_text()
    assert "terminate called" not in server.log.read_text()


def test_a_lame_duck_says_when_to_come_back(unloaded: Callable[..., TestClient]) -> None:
    client = unloaded()
    app: Any = client.app
    app.state.service.drain()
    for answer in (client.get("/readyz"), client.post("/v1/generate", json={"prompt": "x"})):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["message"].startswith("The server is stopping;")
    assert client.get("/livez").status_code == 200


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("number", "busy", "listens_s"),
    [
        (signal.SIGTERM, False, 2),
        (signal.SIGINT, False, 0),
        (signal.SIGTERM, True, 30 - RESPONSE_GRACE_S),
        (signal.SIGINT, True, 30 - RESPONSE_GRACE_S),
    ],
)
def test_the_listener_closes_when_all_is_done_or_time_is_up(
    monkeypatch: pytest.MonkeyPatch, number: int, busy: bool, listens_s: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(drain, "monotonic", clock)
    settings = Settings(drain_s=30, lame_duck_s=2)
    service = Service(settings.limits)
    server = DrainingServer(uvicorn.Config(FastAPI()), service, settings)
    if busy:
        under_way: Any = object()
        server.server_state.tasks.add(under_way)
    assert not asyncio.run(server.on_tick(1))
    server.handle_exit(number, None)
    clock.now += max(0, listens_s - 0.01)
    assert asyncio.run(server.on_tick(1)) == (listens_s == 0)
    assert service.leaving.is_set()
    clock.now += 0.02
    assert asyncio.run(server.on_tick(1))


def _wait(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)
