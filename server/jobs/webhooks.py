"""One webhook: checked, signed, and sent to an address that is resolved once.

The signature follows Standard Webhooks (https://www.standardwebhooks.com, version 1), whose
libraries verify it: HMAC-SHA256 of `id.timestamp.body`, in base64 after `v1,`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import SplitResult, urlsplit

from server.errors import InvalidRequest
from server.jobs.addresses import is_public

__all__ = ["Refused", "check_url", "send", "signed"]

MOST_URL: Final = 2048
ANSWER_S: Final = 15.0
"""Maximum seconds from the name lookup to the status of the response."""

LINE_BYTES: Final = 4096
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3})\b")
_SENDABLE: Final = re.compile(r"[!-~]+")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Refused(Exception):
    """A webhook is not sent, because of its destination."""


def check_url(url: str, *, private: bool) -> None:
    """Check what can be known about a webhook's URL without looking up its name.

    Args:
        url: URL as sent.
        private: whether it may have a private address.

    Raises:
        InvalidRequest: no webhook can be sent there.
    """
    try:
        parts, _ = _parsed(url)
    except ValueError as error:
        raise InvalidRequest("webhook", f"webhook is {url[:60]!r}: {error}.") from None
    host = parts.hostname or ""
    if not private and _is_address(host) and not is_public(host):
        raise InvalidRequest(
            "webhook",
            f"webhook is {url[:60]!r}, but {host} is not a public address; webhooks are sent to "
            "public addresses only.",
        )


def signed(secret: str, identifier: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Make the headers by which a receiver verifies that a webhook is from this server.

    Args:
        secret: `whsec_` and the base64 of the key.
        identifier: identifier of the webhook, the same at each attempt.
        timestamp: Unix time at which it is sent.
        body: body of the webhook.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{identifier}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "webhook-id": identifier,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }


async def send(url: str, headers: Mapping[str, str], body: bytes, *, private: bool) -> int:
    """Post a body, and return the status of the response; redirects are not followed.

    The name is looked up once, and the connection goes to the address that was checked.

    Args:
        url: URL that :func:`check_url` accepted.
        headers: headers besides those of every request.
        body: JSON.
        private: whether the address may be private.

    Raises:
        Refused: the name has an address that is not public.
        OSError: the name is unknown, the connection failed, or there was no response in time.
    """
    parts, port = _parsed(url)
    host = parts.hostname or ""
    async with asyncio.timeout(ANSWER_S):
        address = await _address(host, port, private=private)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            address,
            port,
            ssl=context,
            server_hostname=host if context else None,
            limit=LINE_BYTES,
        )
        try:
            writer.write(_head(parts, headers, len(body)) + body)
            await writer.drain()
            return _status(await reader.readline())
        except ValueError:
            raise ConnectionError("the answer is not HTTP") from None
        finally:
            writer.transport.abort()


def _parsed(url: str) -> tuple[SplitResult, int]:
    """The parts of a URL and its port; raises ValueError with the reason if it is invalid."""
    if len(url) > MOST_URL or not _SENDABLE.fullmatch(url):
        raise ValueError(f"it must have at most {MOST_URL} characters, all printable ASCII")
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("it must begin with https:// or http://")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError("it must have a host, and no user or password")
    return parts, parts.port or _DEFAULT_PORTS[parts.scheme]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _address(host: str, port: int, *, private: bool) -> str:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not private and not all(map(is_public, addresses)):
        raise Refused(f"{host} has an address that is not public")
    return addresses[0]


def _head(parts: SplitResult, headers: Mapping[str, str], size: int) -> bytes:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        "Connection: close",
        "User-Agent: weft",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _status(line: bytes) -> int:
    match = _STATUS.match(line)
    if match is None:
        raise ConnectionError("the answer is not HTTP")
    return int(match[1])
