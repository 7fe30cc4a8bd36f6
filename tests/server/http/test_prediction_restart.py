"""An accepted job outlives the process that accepted it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.http.test_predictions import until
from tests.server.process import PATIENCE_S, Server, served

INPUT = {"prompt": "a red circle", "guidance": "none", "width": 64, "height": 64}
JOBS = 12


def accept(server: Server, steps: int) -> str:
    given = INPUT | {"steps": steps, "seed": steps}
    status, text = server.ask("/v1/predictions", {"input": given})
    assert status in (201, 202), text
    return json.loads(text)["id"]


def jobs(server: Server) -> list[dict[str, Any]]:
    return json.loads(server.ask("/v1/predictions")[1])["results"]


def statuses(server: Server) -> Callable[[], set[str]]:
    return lambda: {job["status"] for job in jobs(server)}


def test_every_accepted_job_ends_once_though_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    monkeypatch.setenv("WEFT_JOBS__FOLDER", str(folder))
    monkeypatch.setenv("WEFT_JOBS__RUNNING", "4")
    options = ("--row-budget", "4")
    with served(tmp_path, "time.sleep(0.05)", *options) as server:
        server.wait_for("/readyz", 200)
        server.disturb()
        accepted = [accept(server, steps) for steps in range(3, 3 + JOBS)]
        until(lambda: {"succeeded", "processing", "starting"} <= statuses(server)())
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(PATIENCE_S)
    stray = folder / "pictures" / "0123"
    stray.mkdir()
    with served(tmp_path, "pass", *options) as server:
        until(lambda: answers(server) and statuses(server)() == {"succeeded"})
        assert [job["id"] for job in jobs(server)] == accepted[::-1]
        assert {job["attempts"] for job in jobs(server)} == {1, 2}
        assert not stray.exists()
    pictures = [path for path in (folder / "pictures").rglob("*") if path.is_file()]
    assert sorted(path.parts[-3] for path in pictures) == sorted(accepted)


def answers(server: Server) -> bool:
    try:
        return server.ask("/readyz")[0] == 200
    except OSError:
        return False
