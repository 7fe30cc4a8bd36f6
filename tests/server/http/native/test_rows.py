"""`GET /v1/rows` on a real server: what it reports of requests that share forward passes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from server.http.native.rows import MAX_WATCHERS
from tests.server.conftest import Running
from tests.server.http.small_server import small_server

SECRET = "a small orange star in the sky"
SMALL = {"prompt": SECRET, "width": 64, "height": 64}


def ticks_of(answer: httpx2.Response, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first tick that meets the condition; there must be one."""
    for line in answer.iter_lines():
        if line.startswith("data: ") and wanted(tick := json.loads(line.removeprefix("data: "))):
            return tick
    raise AssertionError("the stream ended")


@pytest.mark.usefixtures("slow_denoiser")
def test_a_tick_says_whose_rows_it_has_and_nothing_of_prompts(
    client: httpx2.Client, running: Running
) -> None:
    bodies = (
        SMALL | {"steps": 200, "guidance": {"name": "cfg", "scale": 4}},
        SMALL | {"steps": 100, "guidance": "none"},
    )

    def make(number: int) -> None:
        headers = {"x-request-id": f"woven-{number}"}
        client.post("/v1/generate", json=bodies[number], headers=headers)

    makers = [threading.Thread(target=make, args=(number,)) for number in range(len(bodies))]
    with client.stream("GET", "/v1/rows") as answer:
        for maker in makers:
            maker.start()
        tick = ticks_of(answer, lambda tick: len(tick["images"]) == len(bodies))
    for number, maker in enumerate(makers):
        client.delete(f"/v1/generate/woven-{number}")
        maker.join()
    running.settle()
    assert SECRET not in json.dumps(tick)
    guided, plain = sorted(tick["images"], key=lambda image: -image["steps"])
    assert [guided["rule"], guided["branches"]] == ["cfg", ["prompt", "negative"]]
    assert [plain["rule"], plain["branches"]] == ["none", ["prompt"]]
    assert guided["request"] != plain["request"]
    for image in (guided, plain):
        # The default spacing goes in equal strides down from the last of 1,000 timesteps.
        stride = 1000 / image["steps"]
        assert image["timestep"] == pytest.approx(999 - stride * (image["step"] - 1), abs=1)
    watch = running.app.state.service.engine.row_watch
    running.wait(lambda: watch.watchers == 0)
    before = watch.latest
    client.post("/v1/generate", json={"prompt": "a red circle", "steps": 2})
    assert watch.latest is before, "nothing is sampled while nobody watches"


def test_only_so_many_watch_and_a_stopping_server_lets_them_go() -> None:
    with small_server() as server, ExitStack() as seats:
        watch = server.engine.row_watch
        for _ in range(MAX_WATCHERS - 1):
            seats.enter_context(watch.watching())
        client = httpx2.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=20)
        with client, client.stream("GET", "/v1/rows") as answer:
            chunks = answer.iter_raw()
            assert next(chunks).startswith(b":")
            refused = client.get("/v1/rows")
            assert refused.status_code == 429
            assert "8 streams of rows" in refused.json()["error"]["message"]
            server.app.state.service.drain()
            assert list(chunks) == []
        server.wait(lambda: watch.watchers == MAX_WATCHERS - 1)
