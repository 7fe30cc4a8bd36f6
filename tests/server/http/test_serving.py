from __future__ import annotations

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager
from threading import Event
from threading import enumerate as threads

import pytest
from fastapi.testclient import TestClient
from httpx2 import ASGITransport, AsyncClient

from server.errors import BindError, ModelMismatch
from server.http import app
from server.http.serving import listen
from server.settings import Settings

ELSEWHERE = "192.0.2.1"
"""An address reserved for documentation, which no machine has."""


def test_a_port_is_taken_on_every_address_of_a_name_that_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses = [(ELSEWHERE, 0), ("127.0.0.1", 0), ("127.0.0.2", 0)]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    listeners = listen("localhost", 0)
    try:
        names = [listener.getsockname() for listener in listeners]
        assert [host for host, _ in names] == ["127.0.0.1", "127.0.0.2"]
        for name in names:
            with socket.socket() as client:
                client.connect(name)
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (ELSEWHERE, "host is '192.0.2.1', which is not an address of this machine"),
        ("no such name", "host is 'no such name', which names no address"),
    ],
)
def test_a_host_that_is_not_here_is_refused(host: str, reason: str) -> None:
    with pytest.raises(BindError, match=reason):
        listen(host, 0)


def test_a_port_that_listens_already_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=f"port is {port}, which cannot be used on 127"):
            listen("127.0.0.1", port)


def test_models_are_loaded_in_the_context_that_the_process_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    ended = Event()

    @contextmanager
    def context() -> Generator[None]:
        told.append("begun")
        try:
            yield
        finally:
            told.append("ended")
            ended.set()

    def refuse(*_: object) -> None:
        told.append("loading")
        raise ModelMismatch("no such model")

    monkeypatch.setattr(app, "host", refuse)
    with TestClient(app.create_app(Settings(), while_loading=context)):
        assert ended.wait(60)
    assert told == ["begun", "loading", "ended"]


def test_what_routes_depend_on_is_found_without_a_thread() -> None:
    async def threads_of_a_request() -> list[str]:
        before = set(threads())
        transport = ASGITransport(app.create_app(Settings()))
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.delete("/v1/generate/unknown")).status_code == 404
        return [one.name for one in set(threads()) - before]

    assert asyncio.run(threads_of_a_request()) == []
