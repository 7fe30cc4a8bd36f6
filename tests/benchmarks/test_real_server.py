"""A measured server is started, and always ended."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread

import pytest

from benchmarks import real_server
from benchmarks.real_server import Served, served

STUBBORN = """
import signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Ready).serve_forever()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_server_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_server, "END_S", 0.1)
    with served(["-c", STUBBORN]) as server:
        process = Path(f"/proc/{server.process}")
        assert process.exists()
    assert not process.exists()


def test_a_server_that_ends_before_it_is_ready_says_why() -> None:
    command = ["-c", "exit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"), served(command):
        pass


class Endless(BaseHTTPRequestHandler):
    """Answers with a stream that does not end while it is read."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"data: x\n\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Keep the terminal clean."""


def test_a_status_is_had_without_the_content_that_has_no_end() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        served_there = Served(server.server_port, os.getpid(), Path("none"))
        assert served_there.status("GET", "/") == 200
        server.shutdown()
    assert served_there.status("GET", "/") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_memory_of_a_server_has_that_of_processes_which_any_of_its_threads_started() -> None:
    server = Served(1, os.getpid(), Path("none"))
    without = server.resident()
    filling = "held = bytearray(b'x') * 2**27; print(flush=True); input()"
    with ThreadPoolExecutor(1) as threads:
        command = [sys.executable, "-c", filling]
        starting = threads.submit(Popen[bytes], command, stdin=PIPE, stdout=PIPE)
        with starting.result() as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert server.resident() > without + 2**26
            process.communicate(b"\n")
