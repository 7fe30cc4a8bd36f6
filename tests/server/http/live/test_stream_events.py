"""Streams of server-sent events give the same images as `POST /v1/generate`."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.server.conftest import Running
from tests.server.stream_client import pixels_of

SETTINGS = {
    "prompt": "a red circle",
    "steps": 1,
    "seed": 5,
    "width": 64,
    "height": 64,
    "output_format": "png",
}


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_events_bring_the_images_of_rising_seeds_until_the_client_leaves(
    running: Running, client: httpx2.Client
) -> None:
    body = SETTINGS | {"stats_s": 0.1}
    frames: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/stream", json=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = events(stream.iter_lines())
        name, said = next(told)
        assert (name, said["settings"]["source"]) == ("settings", "text")
        names = {name}
        while len(frames) < 2 or "stats" not in names:
            name, data = next(told)
            names.add(name)
            if name == "frame":
                frames.append(data)
    running.settle()
    running.wait(lambda: len(running.app.state.streams) == 0)
    assert names == {"settings", "frame", "stats"}
    for k, frame in enumerate(frames[:2]):
        assert (frame["frame"], frame["source"], frame["seed"]) == (k, None, 5 + k)
        head, _, data = frame["image"].partition(",")
        assert head == "data:image/png;base64"
        alone = client.post("/v1/generate", json=SETTINGS | {"seed": 5 + k}).json()
        assert pixels(data) == pixels(alone["images"][0]["b64_json"])


def test_statistics_come_in_time_while_there_is_no_frame(
    running: Running, client: httpx2.Client
) -> None:
    body = SETTINGS | {"stats_s": 0.1, "max_fps": 0.01}
    with client.stream("POST", "/v1/stream", json=body) as stream:
        told = events(stream.iter_lines())
        # The second frame does not wait until the time of the first has passed.
        while next(told)[1].get("frame") != 1:
            pass
        assert [next(told)[0] for _ in range(3)] == ["stats"] * 3
    running.settle()


def test_statistics_that_are_always_due_hold_up_no_frame(
    running: Running, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.live.events.StatisticsClock.left", lambda *_: 0.0)
    names: list[str] = []
    with client.stream(
        "POST", "/v1/stream", json=SETTINGS | {"stats_s": 0.1, "width": 64, "height": 64}
    ) as stream:
        for name, _ in events(stream.iter_lines()):
            names.append(name)
            if name == "frame" or len(names) == 50_000:
                break
    running.settle()
    assert names[-1] == "frame"


def pixels(data: str) -> bytes:
    return pixels_of(base64.b64decode(data)).tobytes()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"source": "frames"}, "source", "need a WebSocket"),
        ({"seed_step": 0}, "seed_step", "all images would be the same"),
        ({"paused": True}, "paused", "has no effect"),
        ({"transition_frames": 3}, "transition_frames", "has no effect"),
        ({"similarity_filter": {}}, "similarity_filter", "has no effect"),
        ({"stepz": 3}, "stepz", "did you mean steps?"),
        ({"steps": 100_000}, "steps", "at most 200"),
    ],
)
def test_what_needs_a_socket_is_refused(
    running: Running, client: httpx2.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = client.post("/v1/stream", json=SETTINGS | fields)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert len(running.app.state.streams) == 0


def test_a_stream_is_not_counted_among_the_requests_for_images(
    running: Running, client: httpx2.Client
) -> None:
    outcomes = running.app.state.service.outcomes
    before = dict(outcomes)
    headers = {"content-type": "application/json"}
    assert client.post("/v1/stream", content="{", headers=headers).status_code == 400
    assert client.post("/v1/stream", json={"prompt": 3}).status_code == 422
    assert client.post("/v1/stream", json=SETTINGS | {"paused": True}).status_code == 422
    assert dict(outcomes) == before


def test_a_server_that_is_about_to_stop_ends_the_events_with_an_error(
    running: Running, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = asyncio.Event()
    monkeypatch.setattr(running.app.state.service, "leaving", leaving)
    with client.stream("POST", "/v1/stream", json=SETTINGS) as stream:
        told = events(stream.iter_lines())
        next(told)
        [session] = running.app.state.streams.sessions
        session.loop.call_soon_threadsafe(leaving.set)
        *_, (name, said) = told
    monkeypatch.undo()
    assert (name, said["error"]["code"]) == ("error", "not_ready")
    running.settle()
