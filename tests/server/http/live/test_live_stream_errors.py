"""Mistakes of clients of live streams: each gets a clear error, and nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Message
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from server.api_keys import ApiKey
from server.engine.client import Client
from server.errors import NotReady, Overloaded
from server.http.live import stream
from server.service.streams import Streams
from server.settings import Settings, StreamLimits
from tests.server.conftest import Running
from tests.server.stream_client import PATIENCE_S, SMALL, StreamClient, file_of, opened

Unloaded = Callable[..., TestClient]

LARGE = SMALL | {"source": "text", "seed_step": 1, "steps": 1, "width": 128, "height": 128}
"""A stream of images so large that a few fill a connection's buffers."""


@pytest.fixture
def speaker(running: Running) -> Iterator[StreamClient]:
    """A client whose stream has settings; in the end the engine must be idle."""
    with opened(running.url) as client:
        client.settings(**SMALL)
        yield client
    running.settle()
    running.wait(lambda: len(running.app.state.streams) == 0)


@pytest.fixture
def limited(running: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets limits of streams for one test, once those of the test before are closed."""

    def limit(**limits: Any) -> None:
        running.wait(lambda: len(running.app.state.streams) == 0)
        monkeypatch.setattr(running.app.state.streams, "limits", StreamLimits(**limits))

    return limit


BAD_SETTINGS: list[tuple[str, str, str | None, str]] = [
    ("{", "malformed_body", None, "The message is not valid JSON"),
    ("[1]", "malformed_body", None, "The message must be a JSON object"),
    ("{" + '"a":[' * 20_000, "malformed_body", None, "The message is not valid JSON"),
    (json.dumps({"prompt": "x" * 9000}), "invalid_value", "prompt", "9000 characters"),
    ('{"stepz": 3}', "invalid_value", "stepz", "did you mean steps?"),
    ('{"prompt": [{"text": "a", "weight": -1}]}', "invalid_value", "prompt.0.weight", "is -1"),
    ('{"prompt": null}', "invalid_value", "prompt", "prompt is required"),
    ('{"steps": 100000}', "invalid_value", "steps", "at most 200"),
    ('{"in_flight": 100}', "invalid_value", "in_flight", "in_flight is 100; at most 8"),
    ('{"width": 130}', "invalid_value", "width", "multiple of"),
    ('{"source": "text", "strength": 0.5}', "invalid_value", "strength", "source 'frames'"),
    ('{"source": "references"}', "invalid_value", "source", "does not read reference images"),
    ('{"similarity_filter": {"max": 1}}', "invalid_value", "similarity_filter.max", "max_skip"),
    ('{"model": "other"}', "model_not_found", "model", "embedded"),
    (
        '{"guidance": {"name": "cfg", "negtome": {}}}',
        "invalid_value",
        "guidance.negtome",
        "frames of a stream are made one by one",
    ),
    (json.dumps({"prompt": "x" * 300_000}), "invalid_value", "prompt", "300000 characters"),
    (
        json.dumps({"prompt": [{"text": "a"}, {"text": "red " * 900}]}),
        "invalid_value",
        "prompt",
        "tokens",
    ),
]
"""Messages, and the code, field and part of the text of the error that answers each."""


def test_bad_settings_are_answered_and_the_old_ones_hold(speaker: StreamClient) -> None:
    before = speaker.turned(file_of(70)).image
    for message, code, field, words in BAD_SETTINGS:
        speaker.tell(message)
        error = speaker.heard()["error"]
        assert (error["code"], error["param"]) == (code, field), (message[:80], error)
        assert words in error["message"], error
    assert speaker.turned(file_of(70)).image == before


def test_frames_before_the_first_settings_and_bad_first_settings_leave_the_stream_waiting(
    running: Running,
) -> None:
    with opened(running.url) as client:
        client.tell(file_of(1))
        said = client.heard()
        assert said["source"] == 0
        assert "settings as JSON" in said["error"]["message"]
        client.tell("{}")
        assert client.heard()["error"]["param"] == "prompt"
        client.settings(**SMALL)
        assert client.turned(file_of(1)).header["source"] == 1


BAD_FRAMES = [
    (b"", "invalid_value", "frame is not an image"),
    (b"GIF89a" + bytes(40), "invalid_value", "frame is not an image"),
    (file_of(3, kind="JPEG")[:400], "invalid_value", "damaged"),
    (file_of(3) + bytes(3 * 2**20 + 2**20), "too_large", "at most 4194304 are allowed"),
    (file_of(0, size=(4000, 2200)), "too_large", "4000 x 2200"),
]


def test_bad_frames_are_named_and_the_next_one_is_served(speaker: StreamClient) -> None:
    before = speaker.turned(file_of(70))
    for source, (frame, code, words) in enumerate(BAD_FRAMES, start=1):
        speaker.tell(frame)
        said = speaker.heard()
        assert (said["error"]["code"], said["source"]) == (code, source), said
        assert words in said["error"]["message"], said
    after = speaker.turned(file_of(70))
    assert (after.header["frame"], after.header["source"]) == (1, 1 + len(BAD_FRAMES))
    assert after.image == before.image


def test_a_frame_that_fails_in_the_engine_is_named_and_the_next_one_is_served(
    running: Running, speaker: StreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = speaker.turned(file_of(70))
    model = running.app.state.service.ready_shelf().loaded()[0]
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: encode(pixels) * float("nan"))
    speaker.tell(file_of(70))
    said = speaker.heard()
    assert (said["error"]["code"], said["frame"], said["source"]) == ("image_failed", 1, 1)
    monkeypatch.undo()
    after = speaker.turned(file_of(70))
    assert (after.header["frame"], after.image) == (2, before.image)


def test_a_message_beyond_all_bounds_ends_the_stream_alone(running: Running) -> None:
    with opened(running.url) as client:
        client.settings(**SMALL)
        # The header of a binary message; the server refuses its 17 MiB before they arrive.
        client.socket.socket.sendall(b"\x82\xff" + struct.pack(">Q", 17 * 2**20) + b"mask")
        with pytest.raises(ConnectionClosed) as closed:
            client.heard()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
    running.wait(lambda: len(running.app.state.streams) == 0)
    running.settle()


def test_a_message_of_endless_fragments_ends_the_stream_alone(running: Running) -> None:
    with opened(running.url) as client:
        nothing = b"\x80mask"
        client.socket.socket.sendall(b"\x01" + nothing + 5000 * (b"\x00" + nothing))
        client.socket.socket.sendall(b"\x80" + nothing)
        with pytest.raises(ConnectionClosed) as closed:
            client.heard()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert closed.value.rcvd.reason == "message has more than 4096 fragments"
    running.wait(lambda: len(running.app.state.streams) == 0)


def reset(client: StreamClient) -> None:
    """Disappear like a machine that lost power, without a closing handshake."""
    hard = struct.pack("ii", 1, 0)
    client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
    client.socket.socket.close()


def narrow(running: Running) -> socket.socket:
    """A connection whose receive buffer at the client is tiny."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(running.address)
    return connection


@pytest.mark.usefixtures("slow_denoiser")
def test_a_client_that_vanishes_leaves_no_row_behind(running: Running) -> None:
    measured = running.app.state.service.engine.measurements
    cancelled, ticks = measured.cancelled, measured.ticks
    with opened(running.url) as client:
        client.settings(**SMALL | {"steps": 200, "strength": 1.0})
        client.tell(file_of(1))
        running.wait(lambda: measured.ticks > ticks)
        reset(client)
        running.settle()
        running.wait(lambda: len(running.app.state.streams) == 0)
    assert measured.cancelled == cancelled + 1


def test_a_client_that_does_not_read_costs_nothing_and_is_cut_off(
    running: Running, limited: Callable[..., None]
) -> None:
    limited(stall_s=1.0)
    images = running.app.state.service.engine.measurements
    before = images.images
    with opened(running.url, max_queue=1, sock=narrow(running)) as client:
        client.tell(json.dumps(LARGE))
        running.wait(lambda: len(running.app.state.streams) == 0)
        running.settle()
        made = images.images
        time.sleep(0.3)
        assert images.images == made
        assert made - before <= 12, "what it has not read is bounded"
        assert images.pending == 0
    running.settle()


def test_pings_of_a_client_that_does_not_read_are_not_all_kept(running: Running) -> None:
    upgrade = (
        "GET /v1/stream HTTP/1.1",
        f"host: {running.address[0]}",
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    with narrow(running) as client:
        client.settimeout(PATIENCE_S)
        client.sendall("\r\n".join([*upgrade, "", ""]).encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 101")
        running.wait(lambda: running.app.state.streams.sessions)
        [session] = running.app.state.streams.sessions
        # All masked with zeros: pings of 125 bytes, one of four bytes, and a message.
        pings = 16_000 * (b"\x89\xfd" + bytes(4) + bytes(125))
        client.sendall(pings + b"\x89\x84" + bytes(4) + b"last" + b"\x82\x81" + bytes(5))
        running.wait(lambda: session.counts.received == 1)
        received = b""
        while b"\x8a\x04last" not in received:
            received += client.recv(65536)
        assert len(received) < len(pings) / 2
    running.wait(lambda: len(running.app.state.streams) == 0)


def test_a_client_that_vanishes_while_messages_wait_for_it_is_no_error_of_the_server(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(running.url, max_queue=1, sock=narrow(running)) as client:
        client.tell(json.dumps(LARGE))
        running.wait(lambda: running.app.state.streams.sessions)
        [session] = running.app.state.streams.sessions
        running.wait(lambda: session.full and not session.statistics()["in_flight"])
        client.tell('{"steps": 2}')
        time.sleep(0.3)
        reset(client)
        running.wait(lambda: len(running.app.state.streams) == 0)
    running.settle()
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


def test_a_flood_of_settings_is_answered_in_order(speaker: StreamClient) -> None:
    for seed in range(100):
        speaker.tell(json.dumps({"seed": seed}))
    assert [speaker.heard()["settings"]["seed"] for _ in range(100)] == list(range(100))
    assert speaker.turned(file_of(1)).header["seed"] == 99


def test_silent_clients_are_told_so_and_leave(
    running: Running, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(idle_s=0.3)
    for first, patience_s in (({}, 0.3), (SMALL, PATIENCE_S)):
        monkeypatch.setattr(stream, "FIRST_SETTINGS_S", patience_s)
        with opened(running.url) as client:
            if first:
                client.settings(**first)
            assert client.heard()["error"]["code"] == "request_timeout"
            with pytest.raises(ConnectionClosed) as closed:
                client.heard()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008


def test_a_server_that_is_about_to_stop_says_so_and_closes(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, leaving = running.app.state.service, asyncio.Event()
    monkeypatch.setattr(service, "leaving", leaving)
    with opened(running.url) as client:
        client.settings(**SMALL | {"source": "text", "seed_step": 1})
        client.output()
        [session] = running.app.state.streams.sessions
        session.loop.call_soon_threadsafe(leaving.set)
        said = client.heard()
        while "error" not in said:
            client.socket.recv()
            said = client.heard()
        assert said["error"]["code"] == "not_ready"
        assert "stopping" in said["error"]["message"]
        with pytest.raises(ConnectionClosed) as closed:
            client.heard()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
    monkeypatch.undo()
    running.settle()


def test_a_client_that_does_not_read_does_not_hold_the_stop_up(
    running: Running, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(stall_s=2 * PATIENCE_S)
    leaving = asyncio.Event()
    monkeypatch.setattr(running.app.state.service, "leaving", leaving)
    with opened(running.url, max_queue=1, sock=narrow(running)) as client:
        client.tell(json.dumps(LARGE))
        running.wait(lambda: running.app.state.streams.sessions)
        [session] = running.app.state.streams.sessions
        running.wait(lambda: session.full and not session.statistics()["in_flight"])
        began = time.monotonic()
        session.loop.call_soon_threadsafe(leaving.set)
        running.wait(lambda: len(running.app.state.streams) == 0)
        assert time.monotonic() - began < PATIENCE_S
        reset(client)
    monkeypatch.undo()
    running.settle()


def test_no_message_comes_between_a_header_and_the_end_of_a_stream_that_has_no_image_for_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stopped_before_an_image() -> list[Message]:
        streams = Streams(running.app.state.service, Settings())
        session, stopping = streams.open(), asyncio.Event()
        sent: list[Message] = []

        async def until_stopping() -> None:
            await stopping.wait()
            raise NotReady("The server is stopping.")

        async def receive() -> Message:
            if not asked:
                await asyncio.Event().wait()
            return asked.pop(0)

        async def send(message: Message) -> None:
            if message.get("bytes") is not None:
                stopping.set()
                await asyncio.Event().wait()
            sent.append(message)

        monkeypatch.setattr(streams, "until_stopping", until_stopping)
        settings = json.dumps(SMALL | {"source": "text"})
        asked: list[Message] = [
            {"type": "websocket.connect"},
            {"type": "websocket.receive", "text": settings},
        ]
        websocket = WebSocket({"type": "websocket"}, receive, send)
        await websocket.accept()
        try:
            await stream.Conversation(websocket, session, streams).hold()
        finally:
            streams.close(session)
        return sent

    *_, header, last = asyncio.run(stopped_before_an_image())
    assert json.loads(header["text"])["frame"] == 0
    assert (last["type"], last["code"]) == ("websocket.close", 1012)
    running.settle()


def test_streams_beyond_the_limit_are_refused_before_they_open(
    running: Running, limited: Callable[..., None]
) -> None:
    limited(sessions=1)
    with opened(running.url) as client:
        with pytest.raises(InvalidStatus) as refused, opened(running.url):
            pass
        response = refused.value.response
        assert response.status_code == 429
        assert response.headers["retry-after"] == "10"
        assert json.loads(response.body)["error"]["code"] == "overloaded"
        client.settings(**SMALL)
    running.wait(lambda: len(running.app.state.streams) == 0)
    with opened(running.url) as client:
        client.settings(**SMALL)


def test_streams_of_one_key_leave_room_for_those_of_another(
    running: Running, limited: Callable[..., None]
) -> None:
    limited(sessions=3, sessions_per_key=1)
    streams, keys = (
        running.app.state.streams,
        [ApiKey(bytes([k]), Client(f"{k}")) for k in range(2)],
    )

    async def open_some() -> None:
        one_of_each = [streams.open(key) for key in keys]
        with pytest.raises(Overloaded, match="1 streams are open with this key; at most 1"):
            streams.open(keys[0])
        streams.close(one_of_each[0])
        one_of_each[0] = streams.open(keys[0])
        for session in one_of_each:
            streams.close(session)

    asyncio.run(open_some())


KEY = "a-key-of-32-characters-or-so-/+="


def as_subprotocol(key: str) -> str:
    return "weft.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("headers", "subprotocols", "status"),
    [
        ({}, [], 401),
        ({}, ["weft.stream", as_subprotocol("wrong")], 401),
        ({}, ["weft.key.%%%"], 401),
        ({}, ["weft.stream", as_subprotocol(KEY)], 503),
        ({"authorization": b"Bearer " + KEY.encode()}, [], 503),
        ({"origin": "https://elsewhere.example"}, [as_subprotocol(KEY)], 403),
        ({"host": "elsewhere.example"}, [as_subprotocol(KEY)], 403),
    ],
)
def test_the_gate_holds_for_sockets_too(
    unloaded: Unloaded, headers: dict[str, Any], subprotocols: list[str], status: int
) -> None:
    client = unloaded(api_keys=(KEY,))
    with (
        pytest.raises(WebSocketDenialResponse) as refused,
        client.websocket_connect("ws://127.0.0.1:8000/v1/stream", subprotocols, headers=headers),
    ):
        pass
    assert refused.value.status_code == status
    assert refused.value.json()["error"]["message"]


def test_only_the_protocol_is_selected_and_never_the_key(running: Running) -> None:
    offered = ["weft.stream", as_subprotocol("secret")]
    with opened(running.url, subprotocols=offered) as client:
        assert client.socket.subprotocol == "weft.stream"
