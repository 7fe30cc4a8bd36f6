"""Waiting clients are told how many requests are ahead of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import Any

import httpx2
import pytest
from torch import Tensor
from typing_extensions import override

from server.models.inputs import RowInputs
from server.service.hosting import Hosted
from server.settings import Settings
from tests.server.http.small_server import SmallServer
from tests.server.toy_model import Toy, started

PATIENCE_S = 60
BODY = {"prompt": "x", "steps": 2, "stream": True}


class Held(Toy):
    """A model whose forward passes give a signal and wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.entered = Event(), Event()
        self.free.set()

    @override
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        self.entered.set()
        assert self.free.wait(PATIENCE_S)
        return super().evaluate(x, t, inputs)


@pytest.fixture
def held() -> Iterator[tuple[Held, httpx2.Client]]:
    """A model whose next forward pass waits, and a client of its server."""
    model = Held()
    nothing_else: Any = None
    hosted = Hosted(started(model, 8), {"toy": model}, nothing_else)
    server = SmallServer(Settings(), hosted)
    server.start()
    try:
        model.free.clear()
        model.entered.clear()
        url = f"http://127.0.0.1:{server.port}"
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            yield model, client
    finally:
        model.free.set()
        server.stop()


def next_event(lines: Iterator[str]) -> tuple[str, dict[str, Any]]:
    name = next(line for line in lines if line.startswith("event: "))
    return name.removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))


def test_a_position_is_told_at_once_and_when_it_changes(held: tuple[Held, httpx2.Client]) -> None:
    model, client = held
    with ExitStack() as answers:

        def begin() -> tuple[Iterator[str], dict[str, Any]]:
            asking = client.stream("POST", "/v1/generate", json=BODY)
            lines = answers.enter_context(asking).iter_lines()
            name, data = next_event(lines)
            assert name == "queued"
            return lines, data

        # An iterator of lines that nothing refers to would end its request.
        begun = [begin()]
        assert model.entered.wait(PATIENCE_S)
        begun += [begin() for _ in range(3)]
        assert [queued["queue_position"] for _, queued in begun[1:]] == [0, 1, 2]
        assert client.delete(f"/v1/generate/{begun[1][1]['id']}").status_code == 200
        last, _ = begun[-1]
        assert next_event(last) == ("position", {"queue_position": 1})
        model.free.set()
        told = [next_event(last)]
        while told[-1][0] != "completed":
            told.append(next_event(last))
        assert {name for name, _ in told} <= {"position", "progress", "completed"}


def test_automatic1111_s_clients_are_told_too(held: tuple[Held, httpx2.Client]) -> None:
    model, client = held
    with (
        client.stream("POST", "/v1/generate", json=BODY) as running,
        ThreadPoolExecutor() as threads,
    ):
        assert model.entered.wait(PATIENCE_S)
        with client.stream("POST", "/v1/generate", json=BODY) as waiting:
            body = {"prompt": "x", "steps": 2}
            drawing = threads.submit(client.post, "/sdapi/v1/txt2img", json=body)
            while (told := client.get("/sdapi/v1/progress").json())["textinfo"] is None:
                pass
            model.free.set()
            assert drawing.result().status_code == 200
            waiting.read()
        running.read()
    assert told["textinfo"] == "Waiting: 1 request is ahead of this one."
    assert (told["progress"], told["eta_relative"]) == (0.01, 0)
