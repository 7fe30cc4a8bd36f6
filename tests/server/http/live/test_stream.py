"""Events, cancelling and disconnecting, on the real engine over a real socket."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from server.http.native import events as event_stream

LONG = {"prompt": "a blue square", "steps": 200, "seed": 1}
SMALL = {"width": 64, "height": 64}

Event = tuple[str, dict[str, Any]]


def events(lines: Iterator[str]) -> Iterator[Event]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def outcomes(running: Any) -> dict[str, int]:
    return dict(running.app.state.service.outcomes)


def cancelled_images(running: Any) -> int:
    return running.app.state.service.engine.measurements.cancelled


def evaluated(running: Any) -> int:
    return running.app.state.service.engine.measurements.evaluations


def pending(running: Any) -> int:
    return running.app.state.service.engine.measurements.pending


@pytest.mark.parametrize(
    ("headers", "fields"), [({"accept": "text/event-stream"}, {}), ({}, {"stream": True})]
)
def test_events_tell_the_story_in_order(
    client: httpx2.Client, headers: dict[str, str], fields: dict[str, Any]
) -> None:
    body = {"prompt": "a red circle", "steps": 6, "seed": 5, "n": 2} | SMALL | fields
    with client.stream("POST", "/v1/generate", json=body, headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-cache"
        told = list(events(stream.iter_lines()))
        identifier = stream.headers["x-request-id"]
    names = [name for name, _ in told]
    assert names[0] == "queued"
    assert names[-1] == "completed"
    assert set(names[1:-1]) == {"progress"}
    queued, completed = told[0][1], told[-1][1]
    assert queued["id"] == completed["id"] == identifier
    assert queued["settings"] == completed["settings"]
    for index in (0, 1):
        steps = [data["step"] for _, data in told[1:-1] if data["index"] == index]
        assert steps == sorted(set(steps))
        assert steps[-1] <= 6
    previews = [data["preview"] for _, data in told[1:-1] if data["preview"]]
    head, _, preview = previews[0].partition(",")
    assert head == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(preview))).size) <= 128


def test_the_first_event_says_what_has_no_effect(client: httpx2.Client) -> None:
    body = {"prompt": "a red circle", "steps": 2, "guidance": "none", "negative_prompt": "a square"}
    with client.stream("POST", "/v1/generate", json=body | {"stream": True}) as stream:
        told = list(events(stream.iter_lines()))
    (warning,) = told[0][1]["warnings"]
    assert warning.startswith("negative_prompt has no effect")
    assert told[-1][1]["warnings"] == [warning]


def test_the_completed_event_is_the_json_answer(client: httpx2.Client) -> None:
    body = {"prompt": "a red circle", "steps": 3, "seed": 5} | SMALL
    plain = client.post("/v1/generate", json=body).json()
    streamed = client.post("/v1/generate", json=body | {"stream": True})
    *_, (_, completed) = events(streamed.iter_lines())
    assert completed.keys() == plain.keys()
    assert completed["images"] == plain["images"]
    assert completed["settings"] == plain["settings"]


def test_a_refusal_comes_before_the_stream(client: httpx2.Client) -> None:
    answer = client.post("/v1/generate", json=LONG | {"stream": True, "width": 100})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "width"


@pytest.mark.usefixtures("slow_denoiser")
def test_deleting_ends_a_stream_with_an_error(client: httpx2.Client, running: Any) -> None:
    before = cancelled_images(running)
    with client.stream("POST", "/v1/generate", json=LONG | {"stream": True}) as stream:
        told = events(stream.iter_lines())
        _, queued = next(told)
        answer = client.delete(f"/v1/generate/{queued['id']}")
        assert answer.json() == {"id": queued["id"], "cancelled": True}
        *_, (name, error) = told
    assert name == "error"
    assert error["error"]["code"] == "cancelled"
    running.settle()
    assert cancelled_images(running) == before + 1


@pytest.mark.usefixtures("slow_denoiser")
def test_deleting_ends_a_plain_answer(client: httpx2.Client, running: Any) -> None:
    headers = {"x-request-id": "plain-1"}
    answers: list[httpx2.Response] = []

    def post() -> None:
        answers.append(client.post("/v1/generate", json=LONG, headers=headers))

    thread = threading.Thread(target=post)
    thread.start()
    running.wait(lambda: client.delete("/v1/generate/plain-1").status_code == 200)
    thread.join()
    assert answers[0].status_code == 409
    assert answers[0].json()["error"]["code"] == "cancelled"
    assert client.delete("/v1/generate/plain-1").status_code == 404
    running.settle()


def test_nothing_is_there_to_delete(client: httpx2.Client) -> None:
    answer = client.delete("/v1/generate/none")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "No generation 'none' is running."


@pytest.mark.usefixtures("slow_denoiser")
@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["plain", "stream"])
def test_a_client_that_goes_away_costs_nothing_more(running: Any, fields: dict[str, Any]) -> None:
    before, gone = cancelled_images(running), outcomes(running).get("disconnected", 0)
    body = json.dumps(LONG | {"n": 2} | fields).encode()
    head = (
        f"POST /v1/generate HTTP/1.1\r\nHost: 127.0.0.1:{running.address[1]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(running.address) as connection:
        connection.sendall(head.encode() + body)
        running.wait(lambda: pending(running) == 2)
        start = evaluated(running)
        running.wait(lambda: evaluated(running) > start)
    running.settle()
    assert cancelled_images(running) == before + 2
    assert outcomes(running)["disconnected"] == gone + 1
    idle = evaluated(running)
    time.sleep(0.2)
    assert evaluated(running) == idle


def test_a_silent_stream_says_that_it_is_alive(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "PING_S", 0.001)
    answer = client.post("/v1/generate", json=LONG | SMALL | {"steps": 8, "stream": True})
    assert ": ping" in answer.text
    assert list(events(answer.iter_lines()))[-1][0] == "completed"


def test_many_at_once_all_get_their_own(running: Any, generate: Callable[..., Any]) -> None:
    alone = [generate(seed=seed).json()["images"] for seed in range(5)]

    async def together() -> list[Any]:
        async with httpx2.AsyncClient(base_url=running.url, timeout=120) as client:
            body = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64}
            bodies = [body | {"seed": seed} for seed in range(5)]
            answers = await asyncio.gather(
                *(client.post("/v1/generate", json=body) for body in bodies)
            )
        return [answer.json()["images"] for answer in answers]

    assert asyncio.run(together()) == alone
