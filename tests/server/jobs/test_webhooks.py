"""Webhooks are signed as in the standard, and only go to public addresses."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import socket

import pytest

from server.errors import InvalidRequest
from server.jobs.addresses import is_public
from server.jobs.webhooks import Refused, check_url, send, signed

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]
NOT_PUBLIC = [
    "0.0.0.0",  # noqa: S104
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.1.2.3",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001:db8::1",
    "2001:0:0:0:0:0:f5ff:fffe",
    "2002:7f00:1::",
    "2002:c0a8:101::1",
    "3fff::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "2130706433",
    "0x7f.1",
    "127.1",
    "",
]


def test_addresses_of_the_internet_are_public_and_no_others() -> None:
    assert [one for one in PUBLIC if not is_public(one)] == []
    assert [one for one in NOT_PUBLIC if is_public(one)] == []


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example of the specification: its secret, identifier and time."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    key = base64.b64decode(secret[6:])
    told = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body.decode()}"
    mac = hmac.new(key, told.encode(), hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode()


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x.example/",
        "x.example",
        "https://",
        "https://user@x.example/",
        "https://x.example:99999/",
        "https://x.example/\r\nX: y",
        "https://" + "x" * 3000,
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest/meta-data",
    ],
)
def test_a_url_that_cannot_be_a_webhook_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook is"):
        check_url(url, private=False)


@pytest.mark.parametrize("host", ["localhost", "127.1", "0x7f000001", "2130706433", "[::1]"])
def test_no_connection_is_made_to_a_private_address(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://{host}:{listener.getsockname()[1]}/"
        with pytest.raises((Refused, socket.gaierror)):
            asyncio.run(send(url, {}, b"{}", private=False))
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_redirect_is_an_answer_like_any_other() -> None:
    asked: list[bytes] = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"{}"))
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n")
        writer.close()

    async def run() -> int:
        server = await asyncio.start_server(redirect, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            url = f"http://localhost:{port}/a?b=c"
            return await send(url, {"webhook-id": "7"}, b"{}", private=True)

    assert asyncio.run(run()) == 302
    assert asked[0].startswith(b"POST /a?b=c HTTP/1.1\r\nHost: localhost:")
    assert b"\r\nwebhook-id: 7\r\n" in asked[0]
