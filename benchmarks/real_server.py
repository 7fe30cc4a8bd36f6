"""The real server in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

START_S = 120


@contextmanager
def serving(*options: str, threads: int | None = None) -> Generator[int]:
    """Run `weft serve` on a free port until the block ends.

    Args:
        options: of the command.
        threads: that its networks run on; None leaves it to torch.

    Yields:
        The port, once the server is ready.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("weft")), "serve", "--port", str(port), *options]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment)
    try:
        _wait_until_ready(port)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def status(port: int, path: str) -> int:
    """The status of a response, over a connection of its own."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(port: int) -> None:
    for _ in range(START_S * 5):
        try:
            if status(port, "/readyz") == 200:
                return
        except OSError:
            pass
        sleep(0.2)
    raise TimeoutError(f"the server was not ready within {START_S} s")
