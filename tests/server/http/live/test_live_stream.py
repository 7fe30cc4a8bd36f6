"""Live streams over a real socket give the same images as `POST /v1/generate`."""

from __future__ import annotations

import base64
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from weakref import ref

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray

from server.decoding.pool import DecodePool
from server.engine.state.sequence import Sequence
from server.engine.tick import newcomers
from server.engine.tick.pictures import encode_pictures
from server.models.hosted import HostedModel
from tests.server.conftest import Running
from tests.server.stream_client import (
    PATIENCE_S,
    SMALL,
    Output,
    StreamClient,
    file_of,
    opened,
    pixels_of,
)

Alone = Callable[..., NDArray[np.uint8]]
BLUE = "a large blue square"


@pytest.fixture
def client_of_stream(running: Running) -> Iterator[StreamClient]:
    """The only client of a stream."""
    running.wait(lambda: len(running.app.state.streams) == 0)
    with opened(running.url) as client:
        yield client
    running.settle()


@pytest.fixture
def alone(client: httpx2.Client) -> Alone:
    """The image that a request of its own makes of a frame."""

    def make(frame: bytes | None, **fields: Any) -> NDArray[np.uint8]:
        body = {
            name: SMALL[name] for name in ("prompt", "steps", "seed", "width", "height")
        } | fields
        if frame is not None:
            body["image"] = base64.b64encode(frame).decode()
        answer = client.post("/v1/generate", json=body, headers={"accept": "image/png"})
        assert answer.status_code == 200, answer.text
        return pixels_of(answer.content)

    return make


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 4, "sampler": "lcm", "guidance": "none"},
        {"guidance": {"name": "cfg", "scale": 1.2, "policy": "residual"}},
        {"guidance": {"name": "cfg", "policy": {"name": "residual", "mode": "onetime"}}},
        {"sampler": "heun", "strength": 0.5, "width": 96, "height": 64, "negative_prompt": "blue"},
    ],
)
def test_frames_under_way_together_are_to_the_bit_the_images_of_requests_of_their_own(
    client_of_stream: StreamClient, alone: Alone, fields: dict[str, Any]
) -> None:
    said = client_of_stream.settings(**SMALL | fields)
    assert said["from_frame"] == 0
    assert said["notes"] == []
    frames = [file_of(20 * k, bar=9 * k) for k in range(5)]
    for frame in frames:
        client_of_stream.tell(frame)
        time.sleep(0.05)
    got = [client_of_stream.output()]
    while got[-1].header["source"] < len(frames) - 1:
        got.append(client_of_stream.output())
    assert [one.header["frame"] for one in got] == list(range(len(got)))
    sources = [one.header["source"] for one in got]
    assert sources == sorted(set(sources))
    assert got[-1].header["dropped"] == len(frames) - len(got)
    for one in got:
        expected = alone(frames[one.header["source"]], **fields)
        assert np.array_equal(one.pixels, expected), one.header


def test_a_change_smears_over_no_frame(client_of_stream: StreamClient, alone: Alone) -> None:
    client_of_stream.settings(**SMALL | {"steps": 8})
    frame = file_of(90)
    client_of_stream.tell(frame)
    time.sleep(0.1)
    client_of_stream.tell(frame)
    client_of_stream.tell('{"prompt": "a large blue square", "sampler": "euler", "steps": 3}')
    client_of_stream.tell(frame)
    said = [client_of_stream.heard()]
    while "settings" not in said[-1]:
        client_of_stream.socket.recv()
        said.append(client_of_stream.heard())
    changed = said.pop()
    assert changed["settings"]["sampler"]["name"] == "euler"
    images = {
        "red": alone(frame, steps=8),
        "blue": alone(frame, prompt=BLUE, sampler="euler", steps=3),
    }
    outputs: list[Output] = []
    while not outputs or outputs[-1].header["source"] < 2:
        outputs.append(client_of_stream.output())
    for one in outputs:
        new = one.header["frame"] >= changed["from_frame"]
        assert np.array_equal(one.pixels, images["blue" if new else "red"]), one.header
    assert outputs[-1].header["frame"] >= changed["from_frame"]


def test_a_stream_whose_client_has_left_goes_without_a_collection_of_cycles(
    running: Running,
) -> None:
    gc.collect()
    gc.disable()
    try:
        with opened(running.url) as client:
            client.settings(**SMALL)
            client.turned(file_of(90))
            [stream] = map(ref, running.app.state.streams.sessions)
        running.wait(lambda: stream() is None)
    finally:
        gc.enable()


def test_the_newest_frame_waits_and_those_that_it_replaced_are_counted(
    client_of_stream: StreamClient, alone: Alone
) -> None:
    client_of_stream.settings(**SMALL | {"paused": True})
    frames = [file_of(shade) for shade in (0, 60, 120, 180)]
    for frame in frames:
        client_of_stream.tell(frame)
    client_of_stream.settings(paused=False)
    last = client_of_stream.output()
    assert (last.header["source"], last.header["dropped"]) == (3, 3)
    assert np.array_equal(last.pixels, alone(frames[3]))


def test_all_defaults_are_answered_and_open_the_same_stream_again(
    running: Running, client_of_stream: StreamClient
) -> None:
    answer = client_of_stream.settings(prompt="a red circle", steps=2)
    assert answer["settings"]["output_format"] == "jpeg"
    assert answer["settings"]["strength"] == 0.75
    first = client_of_stream.turned(file_of(30))
    assert first.header["seed"] == answer["settings"]["seed"]
    with opened(running.url) as again:
        assert again.settings(**answer["settings"])["settings"] == answer["settings"]
        assert again.turned(file_of(30)).image == first.image


def test_null_restores_a_default_and_a_seed_stays_while_other_settings_change(
    client_of_stream: StreamClient,
) -> None:
    first = client_of_stream.settings(prompt="a red circle", steps=2, sampler="euler")["settings"]
    second = client_of_stream.settings(sampler=None, strength=0.5)["settings"]
    assert second["seed"] == first["seed"]
    assert second["sampler"]["name"] == "dpm_solver_pp"
    assert (second["steps"], second["strength"]) == (2, 0.5)
    assert client_of_stream.settings(seed=None)["settings"]["seed"] != first["seed"]


def test_a_new_prompt_takes_over_frame_by_frame(
    client_of_stream: StreamClient, alone: Alone
) -> None:
    client_of_stream.settings(**SMALL)
    frame = file_of(90)
    red = client_of_stream.turned(frame)
    client_of_stream.settings(prompt=BLUE, transition_frames=2)
    half, whole = client_of_stream.turned(frame), client_of_stream.turned(frame)
    assert np.array_equal(red.pixels, alone(frame))
    assert np.array_equal(whole.pixels, alone(frame, prompt=BLUE))
    mixed = client_of_stream.settings(
        prompt=[{"text": "a red circle"}, {"text": BLUE}], transition_frames=0
    )
    assert mixed["settings"]["prompt"][1] == {"text": BLUE, "weight": 1.0}
    assert np.array_equal(client_of_stream.turned(frame).pixels, half.pixels)


def test_like_frames_are_answered_with_the_image_before_until_too_many_were(
    client_of_stream: StreamClient,
) -> None:
    filtered = {"threshold": 0.5, "max_skip": 3}
    client_of_stream.settings(**SMALL | {"similarity_filter": filtered})
    frame = file_of(90)
    outputs = [client_of_stream.turned(frame) for _ in range(6)]
    skipped = [one.header["skipped"] for one in outputs]
    assert skipped == [False, True, True, True, False, True]
    assert len({one.image for one in outputs}) == 1
    client_of_stream.settings(prompt=BLUE)
    changed = client_of_stream.turned(frame)
    assert not changed.header["skipped"], "the image before it has the old prompt"
    assert changed.image != outputs[0].image


def test_a_frame_that_is_refused_is_none_that_later_ones_are_like(
    client_of_stream: StreamClient,
) -> None:
    wide = {"name": "composed", "prompts": [{"prompt": f"{k} stars"} for k in range(8)]}
    filtered = {"threshold": 0.5, "max_skip": 3}
    client_of_stream.settings(**SMALL | {"guidance": wide, "similarity_filter": filtered})
    for _ in range(2):
        client_of_stream.tell(file_of(90))
        assert client_of_stream.heard()["error"]["param"] == "guidance"


def test_without_input_frames_a_stream_makes_images_of_the_prompt(
    client_of_stream: StreamClient, alone: Alone
) -> None:
    client_of_stream.settings(
        **SMALL | {"source": "text", "seed_step": 3, "max_fps": 20, "steps": 1}
    )
    outputs = [client_of_stream.output() for _ in range(3)]
    client_of_stream.tell('{"paused": true}')
    assert [one.header["seed"] for one in outputs] == [5, 8, 11]
    assert outputs[0].header["source"] is None
    for one in outputs:
        assert np.array_equal(one.pixels, alone(None, seed=one.header["seed"], steps=1))


def test_one_of_the_frames_in_flight_is_there_to_be_decoded(
    running: Running, client_of_stream: StreamClient
) -> None:
    """If more of them were in the denoiser at once, all would only be late."""
    measured = running.app.state.service.engine.measurements
    before = measured.rows_per_tick.copy()
    fields = {"source": "text", "seed_step": 1, "steps": 8, "guidance": "none", "in_flight": 3}
    client_of_stream.settings(**SMALL | fields)
    for _ in range(3):
        client_of_stream.output()
    until = time.monotonic() + PATIENCE_S
    while max(measured.rows_per_tick - before) < 2:
        assert time.monotonic() < until
        client_of_stream.output()
    assert max(measured.rows_per_tick - before) == 2


def test_by_default_no_more_frames_than_stages_are_in_the_denoiser_at_once(
    running: Running, client_of_stream: StreamClient
) -> None:
    measured = running.app.state.service.engine.measurements
    before = measured.rows_per_tick.copy()
    fields = {"source": "text", "seed_step": 1, "steps": 3, "guidance": "none"}
    assert client_of_stream.settings(**SMALL | fields)["settings"]["in_flight"] == 3 + 2
    for _ in range(6):
        client_of_stream.output()
    until = time.monotonic() + PATIENCE_S
    while max(measured.rows_per_tick - before) < 3:
        assert time.monotonic() < until
        client_of_stream.output()
    assert max(measured.rows_per_tick - before) == 3


def test_an_image_that_nothing_changes_is_made_once(
    running: Running, client_of_stream: StreamClient
) -> None:
    client_of_stream.settings(**SMALL | {"source": "text"})
    client_of_stream.output()
    client_of_stream.tell(file_of(10))
    client_of_stream.settings(stats_s=0.3)
    second = client_of_stream.output()
    assert second.header["dropped"] == 1
    running.settle()
    for _ in range(2):
        stats = client_of_stream.statistics()
        assert (stats["frames"], stats["dropped"], stats["in_flight"]) == (2, 1, 0)


def test_statistics_and_metrics_count_what_was_sent(
    running: Running, client: httpx2.Client, client_of_stream: StreamClient
) -> None:
    def metric(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    sent = 'weft_stream_frames_total{outcome="sent"}'
    before = metric(sent), metric("weft_stream_latency_seconds_count")
    assert metric("weft_streams_open") == 1
    client_of_stream.settings(**SMALL)
    client_of_stream.turned(file_of(1))
    client_of_stream.tell(b"no image")
    assert client_of_stream.heard()["error"]["code"] == "invalid_value"
    client_of_stream.settings(stats_s=0.1)
    stats = client_of_stream.statistics()
    assert (stats["received"], stats["frames"], stats["failed"]) == (2, 1, 1)
    assert 0 < stats["latency_p50_s"] <= stats["latency_p95_s"]
    assert stats["fps"] > 0
    assert metric(sent) == before[0] + 1
    assert metric("weft_stream_latency_seconds_count") == before[1] + 1


def test_changes_of_settings_hold_no_statistics_up(client_of_stream: StreamClient) -> None:
    client_of_stream.settings(**SMALL | {"stats_s": 0.3})
    said: list[dict[str, Any]] = []
    for seed in range(10):
        said.append(client_of_stream.settings(seed=seed))
        time.sleep(0.1)
    assert sum("stats" in one for one in said) >= 2


def test_a_full_queue_is_no_error_and_the_newest_frame_waits_for_room(
    running: Running, client_of_stream: StreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    picture = DecodePool.picture

    async def noted(self: DecodePool, data: bytes, *rest: Any) -> NDArray[np.uint8]:
        decoded.append(data)
        return await picture(self, data, *rest)

    monkeypatch.setattr(DecodePool, "picture", noted)
    client_of_stream.settings(**SMALL)
    engine = running.app.state.service.engine
    refused = engine.measurements.refused
    with engine.reserve(8 - engine.measurements.live_pending, live=True):
        for shade in range(3):
            client_of_stream.tell(file_of(shade))
        time.sleep(0.2)
        assert not decoded, "what cannot be taken in is not decoded"
        assert engine.measurements.refused == refused, "a frame that waits is not refused"
    output = client_of_stream.output()
    assert (output.header["source"], output.header["dropped"]) == (2, 2)


def test_streams_of_different_settings_share_forwards_and_calls_of_the_encoder(
    running: Running, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counting(model: HostedModel, members: list[Sequence], *given: Any, fixed: bool) -> None:
        encoded.append(len(members))
        encode_pictures(model, members, *given, fixed=fixed)

    monkeypatch.setattr(newcomers, "encode_pictures", counting)
    ticks = running.app.state.service.engine.measurements.rows_per_tick
    before = dict(ticks)
    of_each = [
        {"prompt": "a red circle", "sampler": "euler", "guidance": "none"},
        {"prompt": BLUE, "sampler": "lcm", "guidance": "cfg"},
        {"prompt": "a green triangle", "sampler": "ddim", "seed": 9},
    ]
    frame = file_of(60)
    with ExitStack() as stack:
        clients = [stack.enter_context(opened(running.url)) for _ in of_each]
        for client, fields in zip(clients, of_each, strict=True):
            client.settings(**SMALL | fields)
        outputs: list[list[Output]] = []
        while not outputs or max(encoded) == 1:
            assert len(outputs) < 30, "no two frames were encoded together"
            for client in clients:
                client.tell(frame)
            outputs.append([client.output() for client in clients])
    running.settle()
    assert any(rows > 2 and count > before.get(rows, 0) for rows, count in ticks.items())
    for made, fields in zip(outputs[-1], of_each, strict=True):
        assert np.array_equal(made.pixels, alone(frame, **fields)), fields
