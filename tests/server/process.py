"""Processes of `weft`, for what happens when it starts, breaks and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from embedded import MODEL_FOLDER

PATIENCE_S = 120
STACKS_S = 0.5
"""Time for a process to write the stacks of its threads."""

SMALL = ("--row-budget", "4", "--model", f"embedded={MODEL_FOLDER}")
"""Options of a server that is ready quickly."""

FORKING = """
import json
import os
import sys

from server.heap import gc_frozen

# The collector would copy all that a fork shares with this process.
with gc_frozen():
    import server.cli
    import server.http.app
    from embedded import MODEL_FOLDER
    from server.models.loading import load_model

    # For what it imports.
    load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
answers = os.fdopen(os.dup(1), "w")
CREATED = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        ended, status = os.waitpid(asked, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if ended else None
    else:
        answer = os.fork()
        if answer == 0:
            break
    print(json.dumps(answer), file=answers, flush=True)
else:
    sys.exit()

answers.close()
streams = os.open(os.devnull, os.O_RDONLY), os.open(asked["log"], CREATED)
for number, opened in enumerate((*streams, streams[1])):
    os.dup2(opened, number)
os.environ.clear()
os.environ.update(asked["environment"])
sys.argv[1:] = asked["arguments"]
exec(asked["code"])
"""
"""Forks processes, and reports how they ended.

It has already imported what a server imports, which takes several seconds, and has one thread. A
fork runs its code to the end of the interpreter, as `python -c` does.
"""


class Process(Protocol):
    """A process that runs a server."""

    @property
    def pid(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None while it runs."""
        ...


class Starter(Protocol):
    """Starts processes."""

    def begun(self, log: Path, code: str, *arguments: str) -> AbstractContextManager[Process]:
        """A process that runs the code, and is killed if the test leaves it running.

        Args:
            log: file for what it writes to its standard output and error.
            code: code that it runs, as `python -c` does.
            arguments: arguments of its command line.
        """
        ...


class NewInterpreters:
    """Starts separate processes, as a fork cannot use CUDA if its parent has."""

    @contextmanager
    def begun(self, log: Path, code: str, *arguments: str) -> Generator[subprocess.Popen[bytes]]:
        """See :meth:`Starter.begun`."""
        command = [sys.executable, "-c", code, *arguments]
        with (
            log.open("wb") as written,
            subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT) as process,
        ):
            try:
                yield process
            finally:
                process.kill()


class Fork:
    """A process that a :class:`Forks` started."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks = forks
        self._status: int | None = None
        self.pid = pid

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """See :meth:`Process.poll`."""
        if self._status is None:
            self._status = self._forks.ask(self.pid)
        return self._status

    def wait(self, patience_s: float) -> int:
        until = time.monotonic() + patience_s
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} did not end")
            time.sleep(0.02)
        return status


class Forks:
    """Starts processes that need not import torch, diffusers and transformers again."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, order: Any) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps(order), file=self._parent.stdin)
        return json.loads(self._parent.stdout.readline())

    @contextmanager
    def begun(self, log: Path, code: str, *arguments: str) -> Generator[Fork]:
        """See :meth:`Starter.begun`."""
        order = {
            "log": str(log),
            "code": code,
            "arguments": arguments,
            "environment": dict(os.environ),
        }
        process = Fork(self, self.ask(order))
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_S)

    def close(self) -> None:
        with self._parent as parent:
            assert parent.stdin is not None
            parent.stdin.close()


SCRIPT = """
import faulthandler
import signal
import sys
import time
from pathlib import Path

faulthandler.register(signal.SIGUSR1)

import torch

from server.cli import main
from server.engine import warmup
from server.models.unet_model import UNetModel

flag = Path(sys.argv.pop(1))
evaluate = UNetModel.evaluate
# What forwards of many rows cost is no matter here, and to measure it takes a second and more.
time_forwards = warmup.time_forwards
warmup.time_forwards = lambda model, most: time_forwards(model, 1)


def changed(self, *given, **named):
    if flag.exists():
        {change}
    return evaluate(self, *given, **named)


UNetModel.evaluate = changed
main()
"""
"""`weft` with a changed denoiser: the change acts while a file, the flag, exists."""


class Server:
    """A `weft serve` whose denoiser breaks or slows down on demand."""

    def __init__(self, process: Process, port: int, flag: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self._flag = flag

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

    def wait_for(self, path: str, status: int, patience_s: float = PATIENCE_S) -> None:
        """Ask until the answer has a status.

        Raises:
            RuntimeError: the process has ended; the message is its output.
            TimeoutError: it took too long; the message is its output, with its threads' stacks.
        """
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            try:
                if self.ask(path)[0] == status:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.05)
        raise TimeoutError(self._what_it_does())

    def ended(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the end of the process; its exit status, see :meth:`Process.poll`.

        Raises:
            TimeoutError: it did not end; the message is its output, with its threads' stacks.
        """
        until = time.monotonic() + patience_s
        while (status := self.process.poll()) is None:
            if time.monotonic() > until:
                raise TimeoutError(self._what_it_does())
            time.sleep(0.02)
        return status

    def _what_it_does(self) -> str:
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_S)
        return self.log.read_text()


@contextmanager
def served(starter: Starter, folder: Path, change: str, *options: str) -> Generator[Server]:
    """A server that is killed if the test leaves it running.

    Args:
        starter: what starts it.
        folder: folder for the flag and the log.
        change: statement that the denoiser runs first, from `disturb` on.
        options: further options of `weft serve`, beside those in `SMALL`.
    """
    flag, log = folder / "flag", folder / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    given = [str(flag), "serve", "--port", str(port), *SMALL, *options]
    with starter.begun(log, SCRIPT.format(change=change), *given) as process:
        yield Server(process, port, flag, log)
