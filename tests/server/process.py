"""A server in a process of its own, for what happens when it starts, breaks and stops."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PATIENCE_S = 120

SCRIPT = """
import sys
import time
from pathlib import Path

import torch

from server.cli import main
from server.engine import engine, warmup
from server.models.unet_model import UNetModel

flag = Path(sys.argv.pop(1))
evaluate = UNetModel.evaluate
# What forwards of many rows cost is no matter here, and to measure it takes a second and more.
engine.time_forwards = lambda model, most: warmup.time_forwards(model, 1)


def changed(self, *given, **named):
    if flag.exists():
        {change}
    return evaluate(self, *given, **named)


UNetModel.evaluate = changed
main()
"""
"""`weft` with another denoiser: the change is made to it while the flag, a file, exists."""


class Server:
    """A `weft serve` whose denoiser breaks or slows down at a sign.

    Args:
        folder: for the flag and the log.
        change: statement that the denoiser runs first, from `disturb` on.
        options: of `weft serve`.
    """

    def __init__(self, folder: Path, change: str, options: tuple[str, ...]) -> None:
        self._flag = folder / "flag"
        self.log = folder / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        code = SCRIPT.format(change=change)
        command = [sys.executable, "-c", code, str(self._flag), "serve", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stderr=log)

    def disturb(self) -> None:
        """Let the change take effect."""
        self._flag.touch()

    def ask(
        self, path: str, body: dict[str, Any] | None = None, key: str | None = None
    ) -> tuple[int, str]:
        """Status and text of an answer."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        request = Request(url, data, {"content-type": "application/json", **headers})
        try:
            with urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def wait_for(self, path: str, status: int) -> None:
        """Ask until the answer has a status."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                if self.ask(path)[0] == status:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text())


@contextmanager
def served(folder: Path, change: str, *options: str) -> Generator[Server]:
    """A server that is killed if the test leaves it running."""
    server = Server(folder, change, options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
