"""A server whose device or engine fails reports it and ends, so that a supervisor restarts it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.server.process import Forks, NewInterpreters, Server, Starter, served

ASSERTS = 'torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]'
"""A device-side assertion, after which no call on the GPU works."""

READY_ON_GPU_S = 60
END_S = 40


def test_a_lost_device_is_said_within_two_seconds_and_ends_the_process(
    forks: Forks, tmp_path: Path
) -> None:
    fault = 'raise RuntimeError("CUDA error: device-side assert triggered")'
    _loses_its_device(forks, tmp_path, fault, "--device", "cpu")


@pytest.mark.cuda
def test_a_gpu_that_is_lost_is_said_within_two_seconds_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The replay of a graph would not run the fault.
    monkeypatch.setenv("WEFT_CUDA_GRAPHS", "off")
    _loses_its_device(NewInterpreters(), tmp_path, ASSERTS, "--device", "cuda")


def _loses_its_device(starter: Starter, folder: Path, fault: str, *options: str) -> None:
    with served(starter, folder, fault, *options) as server:
        server.wait_for("/readyz", 200, READY_ON_GPU_S)
        assert server.ask("/livez")[0] == 200
        server.disturb()
        body = {"prompt": "a red circle", "steps": 3}
        status, answer = server.ask("/v1/generate", body)
        failed_at = time.monotonic()
        assert status == 503
        assert "device-side assert triggered" in json.loads(answer)["error"]["message"]
        assert "device-side assert triggered" in server.ask("/livez")[1]
        assert server.ask("/livez")[0] == server.ask("/readyz")[0] == 503
        assert server.ask("/v1/generate", body)[0] == 503
        assert time.monotonic() - failed_at < 2
        assert server.ended(END_S) not in (0, None)


def test_a_server_that_cannot_warm_up_ends(forks: Forks, tmp_path: Path) -> None:
    fault = 'raise SystemExit("an error that no handler of errors catches")'
    with served(forks, tmp_path, fault) as server:
        server.disturb()
        server.wait_for("/livez", 503)
        assert server.ask("/v1/generate", {"prompt": "a red circle"})[0] == 503
        assert server.ended() not in (0, None)


def test_a_process_that_ends_while_it_is_waited_for_is_told_with_what_it_wrote(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    with NewInterpreters().begun(log, "exit('no such model')") as process:
        server = Server(process, 9, tmp_path / "flag", log)
        with pytest.raises(RuntimeError, match="no such model"):
            server.wait_for("/readyz", 200)


def test_a_server_that_takes_too_long_is_told_with_what_it_does(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import faulthandler, time; faulthandler.register(10); time.sleep(60)"
    with NewInterpreters().begun(log, code) as process:
        server = Server(process, 9, tmp_path / "flag", log)
        with pytest.raises(TimeoutError, match="line 1 in <module>"):
            server.ended(1)
