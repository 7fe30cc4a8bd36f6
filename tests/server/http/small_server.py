"""A real server on the toy model, for tests that speak to its socket byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from server.http.app import create_app
from server.http.connection import connections
from server.service.hosting import Hosted
from server.settings import Settings
from tests.server.toy_model import Toy, started

PATIENCE_S = 60


class SmallServer:
    """uvicorn in a thread, with a watch on how long its event loop is blocked at most.

    Attributes:
        longest_gap_s: the longest time in which the event loop did not run.
        longest_stop_s: the same, but no longer than this process was computing meanwhile, as a
            loaded machine may give it no time.

    Args:
        settings: settings of the server.
        hosted: its engine and models; the toy model if None.
    """

    def __init__(self, settings: Settings, hosted: Hosted | None = None) -> None:
        self.app = create_app(settings)
        if hosted is None:
            self.engine = started(Toy(), 8, max_pending=settings.max_pending)
            self.app.state.service.open(self.engine, {"toy": Toy()})
        else:
            self.engine = hosted.engine
            self.app.state.service.open(hosted.engine, hosted.models, hosted.source)
        config = uvicorn.Config(
            self.app,
            http=connections(settings),
            port=0,
            lifespan="off",
            log_level="critical",
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        self.longest_gap_s = self.longest_stop_s = 0.0
        self._thread = threading.Thread(target=self._run, name="uvicorn")

    @property
    def port(self) -> int:
        return self.server.servers[0].sockets[0].getsockname()[1]

    def start(self) -> None:
        self._thread.start()
        self.wait(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        self.app.state.service.close()
        self.engine.stop(0)

    def wait(self, happened: Any) -> None:
        until = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < until, "the server did not get there"
            time.sleep(0.005)

    def connect(self, timeout_s: float = PATIENCE_S) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def post(self, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of one request, over a connection of its own."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.connect() as client:
            client.sendall(self.head("POST", len(content), **headers))
            send(client, content)
            return answer_of(client)

    def head(self, method: str, length: int, path: str = "/v1/generate", **headers: str) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            "host: 127.0.0.1",
            "content-type: application/json",
            f"content-length: {length}",
            "connection: close",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode()

    def _run(self) -> None:
        async def serve() -> None:
            watching = asyncio.ensure_future(self._watch())
            jobs: Any = self.app.state.jobs
            if jobs is not None:
                await jobs.open()
            await self.server.serve()
            if jobs is not None:
                await jobs.close()
            watching.cancel()

        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(serve())

    async def _watch(self) -> None:
        while True:
            began, computed = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.005)
            gap_s = time.perf_counter() - began - 0.005
            self.longest_gap_s = max(self.longest_gap_s, gap_s)
            stop_s = min(gap_s, time.process_time() - computed)
            self.longest_stop_s = max(self.longest_stop_s, stop_s)


@contextmanager
def small_server(**settings: Any) -> Generator[SmallServer]:
    server = SmallServer(Settings(**settings))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def send(client: socket.socket, content: bytes) -> None:
    """Send until the server has answered and closed."""
    with suppress(OSError):
        client.sendall(content)


def answer_of(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON; (0, {}) if the connection is closed without an answer."""
    received = b""
    try:
        while chunk := client.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    if not received:
        return 0, {}
    head, _, content = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)
