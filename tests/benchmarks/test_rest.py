"""A measurement starts only when the server has finished leftovers of the previous one."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread

import pytest

from benchmarks.promises.rest import comes_to_rest
from benchmarks.real_server import Served

WAITS = "input()"
DECODES = """
from threading import Thread
def work():
    while True: pass
Thread(target=work, daemon=True).start()
input()
"""


@contextmanager
def server(program: str, waiting: int) -> Generator[Served]:
    """A process that runs a program, with metrics that report ``waiting`` images in the queue."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"weft_queue_images {waiting}\n".encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            """Keep the terminal clean."""

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as metrics,
        Popen([sys.executable, "-c", program], stdin=PIPE) as process,
    ):
        Thread(target=metrics.serve_forever, daemon=True).start()
        try:
            yield Served(metrics.server_port, process.pid, Path("none"))
        finally:
            metrics.shutdown()
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize(
    ("program", "waiting", "rests"),
    [(WAITS, 0, True), (WAITS, 1, False), (DECODES, 0, False)],
    ids=["nothing to do", "images wait", "a thread works"],
)
def test_a_server_is_at_rest_when_nothing_waits_and_its_processes_do_nothing(
    program: str, waiting: int, rests: bool
) -> None:
    with server(program, waiting) as served:
        assert comes_to_rest(served, within_s=60 if rests else 0) == rests
