"""Connections that send too much or too slowly, or do not read, are ended; others are served."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from threading import Event
from typing import Any
from unittest.mock import patch

import httpx2
import pytest
from fastapi import Response

from tests.server.http.small_server import PATIENCE_S, SmallServer, answer_of, small_server
from tests.server.toy_model import Toy

MAX_CONNECTIONS = 8
SOON_S = 0.5
WRITE_S = 1.0


LARGE = bytes(16 * 2**20)
"""More than the system buffers for a client that does not read."""


@pytest.fixture(scope="module")
def server() -> Iterator[SmallServer]:
    """A server that gives up only clients that do not read, with room for a few connections."""
    with small_server(
        headers_s=PATIENCE_S, write_s=WRITE_S, max_connections=MAX_CONNECTIONS
    ) as made:
        yield made


@pytest.fixture(scope="module")
def hasty() -> Iterator[SmallServer]:
    """A server that gives clients up soon that send no headers."""
    with small_server(headers_s=SOON_S) as made:
        yield made


@contextmanager
def held_forwards() -> Generator[None]:
    """Within this context, no forward of the toy model ends."""
    free, evaluate = Event(), Toy.evaluate

    def held(model: Toy, *given: Any) -> Any:
        assert free.wait(PATIENCE_S)
        return evaluate(model, *given)

    with patch.object(Toy, "evaluate", held):
        try:
            yield
        finally:
            free.set()


def rest_of(client: socket.socket) -> bytes:
    """Everything that the server sends until it ends the connection."""
    received = b""
    with suppress(ConnectionError):
        while chunk := client.recv(65536):
            received += chunk
    return received


def pushing_ends(client: socket.socket, data: bytes, within_s: float) -> bool:
    """Whether the server ends a connection on which these bytes are sent again and again."""
    client.settimeout(0.05)
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            client.sendall(data)
            if not client.recv(65536):
                return True
        except TimeoutError:
            pass
        except ConnectionError:
            return True
    return False


def with_little_room(server: SmallServer) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.settimeout(PATIENCE_S)
    client.connect(("127.0.0.1", server.port))
    return client


def alive(server: SmallServer) -> bool:
    with server.connect() as client:
        client.sendall(server.head("GET", 0, "/livez"))
        return answer_of(client) == (200, {"status": "alive"})


def open_connections(server: SmallServer) -> int:
    return len(server.server.server_state.connections)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"y" * 40_000,
        b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ],
    ids=["a header", "an endless header", "a path", "many headers"],
)
def test_headers_that_are_too_large_are_refused(server: SmallServer, head: bytes) -> None:
    with server.connect() as client:
        client.sendall(head)
        status, answer = answer_of(client)
    assert status == 431
    assert answer["error"]["message"] == (
        "The headers are too large; at most 128 headers and 32768 bytes of them are allowed."
    )


def test_what_follows_a_refused_request_is_not_served(server: SmallServer) -> None:
    served: list[bool] = []
    server.app.add_api_route("/seen", lambda: served.append(True))
    large = b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n" + b"a: b\r\n" * 200 + b"\r\n"
    with server.connect() as client:
        client.sendall(large + server.head("GET", 0, "/seen") + large + b"\x16\x03 no HTTP")
        client.shutdown(socket.SHUT_WR)
        received = rest_of(client)
    assert received.startswith(b"HTTP/1.1 431")
    assert received.count(b"HTTP/1.1") == 1
    assert alive(server)
    assert not served


def test_a_socket_with_too_many_headers_is_refused_like_any_request(
    server: SmallServer, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = server.head("GET", 0, "/v1/stream", upgrade="websocket")
    upgrade = upgrade.replace(b"connection: close", b"connection: upgrade").removesuffix(b"\r\n")
    with server.connect() as client:
        client.sendall(upgrade + b"a: b\r\n" * 200 + b"\r\n")
        assert answer_of(client)[0] == 431
    assert [record for record in caplog.records if record.exc_info] == []


def test_headers_of_a_usual_size_are_served(server: SmallServer) -> None:
    with server.connect() as client:
        client.sendall(server.head("GET", 0, "/livez", x_large="y" * 16_000))
        assert answer_of(client)[0] == 200


def test_what_is_no_http_is_answered_in_the_form_of_all_errors(server: SmallServer) -> None:
    with server.connect() as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        status, answer = answer_of(client)
    assert (status, answer["error"]["code"]) == (400, "malformed_request")


def test_a_client_that_sends_nothing_is_dropped(hasty: SmallServer) -> None:
    began = time.monotonic()
    with hasty.connect() as client:
        rest_of(client)
    assert SOON_S / 2 < time.monotonic() - began < 20 * SOON_S


def test_headers_that_trickle_are_given_up(hasty: SmallServer) -> None:
    with hasty.connect() as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n")
        began = time.monotonic()
        for _ in range(int(4 * SOON_S / 0.05)):
            time.sleep(0.05)
            try:
                client.sendall(b"x: y\r\n")
            except OSError:
                break
        status, answer = answer_of(client)
        assert time.monotonic() - began < 20 * SOON_S
    # The kernel may drop the answer if more was sent after it.
    assert status in (408, 0)
    if status:
        assert answer["error"]["message"] == "The headers did not arrive within 0.5 s."


def test_blank_lines_are_no_sign_of_life(server: SmallServer) -> None:
    # Those of other tests.
    server.wait(lambda: open_connections(server) == 0)
    with server.connect() as client:
        client.sendall(server.head("GET", 0, "/livez").replace(b"connection: close\r\n", b""))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        connection: Any
        [connection] = server.server.server_state.connections
        connection._patience = replace(connection._patience, headers_s=SOON_S)
        assert pushing_ends(client, b"\r\n", 40 * SOON_S)


def test_a_connection_serves_one_request_after_another(server: SmallServer) -> None:
    # Those of other tests.
    server.wait(lambda: open_connections(server) == 0)
    with httpx2.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        for _ in range(3):
            assert client.get("/livez").status_code == 200
            assert open_connections(server) == 1


def test_a_client_that_does_not_read_is_dropped(server: SmallServer) -> None:
    asked: list[bool] = []

    def large() -> Response:
        asked.append(True)
        return Response(LARGE)

    server.app.add_api_route("/unread", large)
    with with_little_room(server) as client:
        client.sendall(server.head("GET", 0, "/unread"))
        server.wait(lambda: asked)
        server.wait(lambda: open_connections(server) == 0)
        assert len(rest_of(client)) < len(LARGE)


def test_a_client_that_reads_slowly_but_steadily_gets_all(server: SmallServer) -> None:
    def read() -> tuple[bytes, float, float]:
        """What was received, the seconds it took, and the longest break in it."""
        server.longest_gap_s = 0
        with with_little_room(server) as client:
            client.sendall(server.head("GET", 0, "/large"))
            received, times = b"", [time.monotonic()]
            with suppress(ConnectionError):
                while chunk := client.recv(2**20):
                    received += chunk
                    times.append(time.monotonic())
                    time.sleep(0.005)
            times.append(time.monotonic())
        breaks = [server.longest_gap_s, *(later - before for before, later in pairwise(times))]
        return received, times[-1] - times[0], max(breaks)

    server.app.add_api_route("/large", lambda: Response(LARGE))
    received, seconds, longest_break = read()
    while longest_break > WRITE_S / 2:
        # A thread was late, so the reading was not steady.
        received, seconds, longest_break = read()
    assert received.endswith(LARGE)
    assert seconds > WRITE_S


def test_when_there_are_many_connections_the_one_that_waited_longest_makes_way(
    server: SmallServer,
) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(3 * MAX_CONNECTIONS)]
        server.wait(lambda: open_connections(server) == MAX_CONNECTIONS)
        assert alive(server)
        began = time.monotonic()
        rest_of(idle[0])
        assert time.monotonic() - began < PATIENCE_S / 2


def test_unfinished_requests_make_way_and_those_being_served_do_not() -> None:
    with small_server(max_connections=2) as server, held_forwards(), ExitStack() as stack:
        served = [stack.enter_context(server.connect()) for _ in range(2)]
        body = b'{"prompt": "x"}'
        served[0].sendall(server.head("POST", len(body)) + body)
        served[1].sendall(server.head("POST", 1000) + b'{"prompt": ')
        server.wait(lambda: server.engine.measurements.pending == 1)
        assert alive(server)
        assert not rest_of(served[1])
        served[1].close()
        served[1] = stack.enter_context(server.connect())
        served[1].sendall(server.head("POST", len(body)) + body)
        server.wait(lambda: server.engine.measurements.pending == 2)
        with server.connect() as client:
            status, answer = answer_of(client)
        assert status == 429
        assert answer["error"]["message"].startswith("2 connections are open, which is the maximum")


def test_a_request_that_was_sent_ahead_keeps_its_place() -> None:
    with small_server(max_connections=1) as server, held_forwards():
        body = b'{"prompt": "x"}'
        first = server.head("GET", 0, "/livez").replace(b"connection: close\r\n", b"")
        with server.connect() as ahead:
            ahead.sendall(first + server.head("POST", len(body)) + body)
            server.wait(lambda: server.engine.measurements.pending == 1)
            with server.connect() as client:
                assert answer_of(client)[0] == 429
            assert server.engine.measurements.pending == 1


def test_the_end_of_a_body_is_not_counted_as_the_next_request_s_headers(
    server: SmallServer,
) -> None:
    body = b"{" + b" " * 40_000
    first = server.head("POST", len(body)).replace(b"connection: close\r\n", b"")
    second = server.head("GET", 0, "/livez")
    with server.connect() as client:
        client.sendall(first)
        time.sleep(SOON_S / 10)
        client.sendall(body + second[:40])
        time.sleep(SOON_S / 10)
        client.sendall(second[40:])
        received = rest_of(client)
    assert received.startswith(b"HTTP/1.1 400")
    assert b"HTTP/1.1 200" in received


def test_a_body_that_goes_on_after_its_refusal_ends(
    server: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.connection.LINGER_S", SOON_S)
    head = server.head("POST", 2**20).replace(b"connection: close\r\n", b"")
    with server.engine.reserve(200), server.connect() as client:
        client.sendall(head.replace(b"application/json", b"text/plain"))
        assert client.recv(65536).startswith(b"HTTP/1.1 415")
        assert pushing_ends(client, b"x" * 10, 40 * SOON_S)
