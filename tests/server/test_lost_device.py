"""A server whose device fails says so and ends, so that an orchestrator starts it again."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

PATIENCE_S = 120

SERVER = """
import sys
from pathlib import Path

import torch

from server.cli import app
from server.models.unet_model import UNetModel

port, flag = sys.argv[1], Path(sys.argv[2])
evaluate = UNetModel.evaluate


def faulty(self, *given, **named):
    if flag.exists():
        {fault}
    return evaluate(self, *given, **named)


UNetModel.evaluate = faulty
app(["serve", "--port", port, "--device", "{device}", "--row-budget", "4"])
"""


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def wait_until_ready(port: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            if ask(port, "/readyz")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError


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
    tmp_path: Path, device: str, fault: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flag = tmp_path / "lost"
    script = SERVER.format(device=device, fault=fault)
    server = subprocess.Popen([sys.executable, "-c", script, str(port), str(flag)])
    try:
        wait_until_ready(port)
        assert ask(port, "/livez")[0] == 200
        flag.touch()
        body = {"prompt": "a red circle", "steps": 3}
        status, answer = ask(port, "/v1/generate", body)
        failed_at = time.monotonic()
        assert status == 503
        assert "device-side assert triggered" in json.loads(answer)["error"]["message"]
        assert "device-side assert triggered" in ask(port, "/livez")[1]
        assert ask(port, "/livez")[0] == ask(port, "/readyz")[0] == 503
        assert ask(port, "/v1/generate", body)[0] == 503
        assert time.monotonic() - failed_at < 2
        assert server.wait(60) not in (0, None)
    finally:
        server.kill()
        server.wait()
