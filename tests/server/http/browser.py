"""A real headless browser, and its tabs."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.sync.client import ClientConnection, connect

PATIENCE_S = 60
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """A page in a browser, driven over the browser's debugging protocol.

    Its scripts may use `tools`, a script of definitions.
    """

    def __init__(self, connection: ClientConnection, tools: str) -> None:
        self._connection = connection
        self._tools = tools
        self._numbers = itertools.count()
        self._before: str | None = None

    def open(self, url: str, before: str = "") -> None:
        """Load a page, after running a script before its own.

        Args:
            url: that differs from the last page's before the #, or has no #.
            before: the script.
        """
        self.call("Page.enable")
        if self._before is not None:
            self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=self._before)
        added = self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self._before = added["identifier"]
        self.call("Page.navigate", url=url)
        self._told(lambda news: news.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Run this body as an asynchronous function, and return its result."""
        body = f"(async () => {{ {self._tools} {script} }})()"
        answer = self.call(
            "Runtime.evaluate", expression=body, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        return self._told(lambda news: news.get("id") == number)["result"]

    def _told(self, awaited: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not awaited(news := json.loads(self._connection.recv(PATIENCE_S))):
            pass
        return news


@contextmanager
def browsing(folder: Path) -> Generator[str]:
    """Run a browser, whose webcam shows a test pattern; gives the address of its debugging port."""
    if BROWSER is None:
        pytest.skip(f"the page is tried in a browser, and there is none of {', '.join(NAMES)} here")
    # Containers run as root, for whom the browser's own sandbox does not start.
    options = ["--headless", "--no-sandbox", "--remote-debugging-port=0"]
    webcam = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [BROWSER, *options, *webcam, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield _address(process, folder / "log")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@contextmanager
def new_tab(browser: str, tools: str) -> Generator[Tab]:
    """A tab of the browser at this address."""
    with httpx2.Client(base_url=browser, trust_env=False) as debugging:
        opened = debugging.put("/json/new").json()
        with connect(opened["webSocketDebuggerUrl"], proxy=None, max_size=None) as connection:
            yield Tab(connection, tools)
        debugging.get(f"/json/close/{opened['id']}")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + PATIENCE_S
    while not (found := re.search(r"DevTools listening on ws://([\w.:]+)/", log.read_text())):
        if process.poll() is not None or time.monotonic() > until:
            pytest.skip(f"{BROWSER} does not start: {log.read_text()[-500:]}")
        time.sleep(0.02)
    return f"http://{found[1]}"
