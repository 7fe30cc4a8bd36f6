"""The real server in a process of its own, with a client for it and measurements of its process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from http.client import HTTPResponse

__all__ = ["AUTHORIZATION", "KEY", "MIB", "SERVE", "Served", "served"]

KEY: Final = "servers-are-measured-with-this-key"
AUTHORIZATION: Final = {"authorization": f"Bearer {KEY}"}
SERVE: Final = ("-c", "from server.cli import main; main()", "serve")
"""Arguments to Python that run `weft serve`."""

START_S: Final = 180
END_S: Final = 40
SETTLES_S: Final = 3.0
"""Seconds within which a server that is still preparing makes visible progress."""

MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        port: port that it listens on, at 127.0.0.1.
        process: its process ID.
        log: file with its output.
    """

    port: int
    process: int
    log: Path

    def connect(self, timeout_s: float = 60) -> socket.socket:
        """Open a plain TCP connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 30,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers (names in lower case) and content; status 0 if there is no response."""
        try:
            with self._answer(method, path, body, headers, timeout_s) as answer:
                sent = {name.lower(): value for name, value in answer.getheaders()}
                return answer.status, sent, answer.read()
        except (OSError, HTTPException):
            return 0, {}, b""

    def status(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Status of a response whose body may be endless and is not read; 0 if there is none."""
        try:
            with self._answer(method, path, body, headers, 30) as answer:
                return answer.status
        except (OSError, HTTPException):
            return 0

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        timeout_s: float,
    ) -> Generator[HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        sent = {**AUTHORIZATION, "content-type": "application/json"}
        try:
            connection.request(method, path, body, {**sent, **(headers or {})})
            yield connection.getresponse()
        finally:
            connection.close()

    def generate(self, **fields: Any) -> tuple[int, Mapping[str, str], bytes]:
        """Send a request for images."""
        body = {"prompt": "a red circle", "steps": 2, "seed": 1} | fields
        return self.ask("POST", "/v1/generate", json.dumps(body).encode())

    def settle(self, max_s: float) -> None:
        """Wait until the default model's forward passes are prepared and recorded, on a GPU.

        Args:
            max_s: maximum seconds to wait.
        """
        until, before = monotonic() + max_s, None
        while monotonic() < until:
            models = json.loads(self.ask("GET", "/v1/models")[2])["data"]
            now = [(one["forward_rows"], one["recorded_rows"]) for one in models]
            if now == before or not any(rows for rows, _ in now):
                return
            before = now
            sleep(SETTLES_S)

    def head(self, method: str, path: str, length: int) -> bytes:
        """The head of a request, to send over a plain connection."""
        lines = (
            f"{method} {path} HTTP/1.1",
            "host: 127.0.0.1",
            f"authorization: Bearer {KEY}",
            "content-type: application/json",
            f"content-length: {length}",
        )
        return "\r\n".join((*lines, "", "")).encode()

    def resident(self) -> int:
        """Resident memory in bytes of the server's process and its children."""
        return sum(_resident(process) for process in (self.process, *_children(self.process)))

    def processor_s(self) -> float:
        """Processor seconds that the server's process and its children have used."""
        return sum(_processor_s(process) for process in (self.process, *_children(self.process)))

    def waiting_images(self) -> float | None:
        """Number of images queued or running; None if the server does not respond in time."""
        status, _, content = self.ask("GET", "/metrics", timeout_s=5)
        return _value(content, "weft_queue_images") if status == 200 else None

    def kill(self) -> None:
        """Kill the server."""
        os.kill(self.process, signal.SIGKILL)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        return _value(self.ask("GET", "/metrics")[2], name)

    def livez_s(self) -> float:
        """Seconds that `/livez` takes, over a new connection."""
        began = perf_counter()
        self.ask("GET", "/livez", timeout_s=60)
        return perf_counter() - began


@contextmanager
def served(arguments: Sequence[str], **environment: str) -> Generator[Served]:
    """Start a server, wait until it is ready, and stop it at the end.

    Args:
        arguments: arguments to Python, without the port, which is added; see `SERVE`.
        environment: settings as environment variables.

    Raises:
        RuntimeError: the server ended before it was ready; the message is its output.
        TimeoutError: the server was not ready in time; the message is its output.
    """
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        port = _free_port()
        with log.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, *arguments, "--port", str(port)],
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**os.environ, "WEFT_API_KEYS": KEY, **environment},
            )
            server = Served(port, process.pid, log)
            try:
                _wait_until_ready(server, process)
                yield server
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        # A deliberately weakened server may still decode pictures that nobody waits for.
        process.kill()
        process.wait()


def _wait_until_ready(server: Served, process: subprocess.Popen[bytes]) -> None:
    until = monotonic() + START_S
    while server.ask("GET", "/readyz", timeout_s=5)[0] != 200:
        if process.poll() is not None:
            raise RuntimeError(server.log.read_text())
        if monotonic() > until:
            raise TimeoutError(server.log.read_text())
        sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _value(metrics: bytes, name: str) -> float:
    lines = metrics.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _processor_s(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def _children(process: int) -> list[int]:
    """Child processes of a process, started by any of its threads."""
    children: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, (thread / "children").read_text().split())
    return children
