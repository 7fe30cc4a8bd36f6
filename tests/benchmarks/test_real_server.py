"""The server that is measured is started, and ended, whatever it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import real_server
from benchmarks.real_server import served

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
