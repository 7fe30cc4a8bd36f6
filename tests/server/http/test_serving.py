from __future__ import annotations

import socket

import pytest

from server.errors import CannotListen
from server.http.serving import listen

ELSEWHERE = "192.0.2.1"
"""An address of documentation, which no machine has."""


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
        (ELSEWHERE, "host is '192.0.2.1', which is no address of this machine"),
        ("no such name", "host is 'no such name', which names no address"),
    ],
)
def test_a_host_that_is_not_here_is_refused(host: str, reason: str) -> None:
    with pytest.raises(CannotListen, match=reason):
        listen(host, 0)


def test_a_port_that_listens_already_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"port is {port}, which cannot be used on 127"):
            listen("127.0.0.1", port)
