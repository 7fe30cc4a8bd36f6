"""A server whose device or engine fails says so and ends, so that a supervisor starts it again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.server.process import Forks, served


@pytest.mark.parametrize(
    ("device", "fault"),
    [
        ("cpu", 'raise RuntimeError("CUDA error: device-side assert triggered")'),
        pytest.param(
            "cuda",
            'torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]',
            marks=pytest.mark.cuda,
        ),
    ],
)
def test_a_lost_device_is_said_within_two_seconds_and_ends_the_process(
    forks: Forks, tmp_path: Path, device: str, fault: str
) -> None:
    with served(forks, tmp_path, fault, "--device", device) as server:
        server.wait_for("/readyz", 200)
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
        assert server.process.wait(60) not in (0, None)


def test_a_server_that_cannot_warm_up_ends(forks: Forks, tmp_path: Path) -> None:
    fault = 'raise SystemExit("an error that no handler of errors catches")'
    with served(forks, tmp_path, fault) as server:
        server.disturb()
        server.wait_for("/livez", 503)
        assert server.ask("/v1/generate", {"prompt": "a red circle"})[0] == 503
        assert server.process.wait(60) not in (0, None)
