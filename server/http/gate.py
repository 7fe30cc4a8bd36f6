"""The gate: middleware that decides who may use the server, before a request is processed.

It is plain ASGI middleware, so that the route still learns of a client's disconnect.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api_keys import ApiKey
from server.errors import Forbidden, TooLarge, Unauthorized, WeftError
from server.http import documents
from server.http.errors import AUTOMATIC1111
from server.settings import Settings

__all__ = ["PROBES", "PUBLIC", "RESULTS", "Gate", "RequestId", "needs_key"]

PROBES: Final = frozenset({"/livez", "/readyz"})
"""Paths called by orchestrators, which send an IP address as the host and have no key."""

PUBLIC: Final = PROBES | documents.PATHS | {"/openapi.json"}
"""Paths that never need a key; if keys are set, all others except those below `RESULTS` do."""

RESULTS: Final = "/v1/results/"
"""Below this path are images with names that nobody can guess, which need no key."""

WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})

BODILESS_BYTES: Final = 1024
"""Maximum content-length of requests with other methods, whose body is not read."""

KEY_SUBPROTOCOL: Final = "weft.key."
"""Prefix of a WebSocket subprotocol that carries an API key in base64url without padding."""

_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")


class RequestId:
    """Gives every request an identifier and every response the header `x-request-id`.

    A valid identifier sent by the client is kept. It is also the identifier of the generation, so a
    client can cancel before it has read a byte of the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        chosen = Headers(scope=scope).get("x-request-id", "")
        identifier = chosen if _VALID_ID.fullmatch(chosen) else f"gen-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = identifier

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = identifier
            await send(message)

        await self._app(scope, receive, send_with_id)


class Gate:
    """Refuses unknown hosts and origins, missing keys and bodies whose content-length is too large.

    Args:
        app: application behind the gate.
        settings: settings with the hosts, origins, keys and limits.
        answer: function that turns a refusal into a response.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, answer: Callable[[WeftError, str], Response]
    ) -> None:
        self._app = app
        self._answer = answer
        self._hosts = frozenset(name.lower().strip("[]") for name in settings.hosts)
        self._origins = frozenset(origin.lower() for origin in settings.allowed_origins)
        self._keys = settings.api_keys
        self._body_bytes = settings.limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._admit(scope, Headers(scope=scope))
        except WeftError as refusal:
            # For WebSockets too: uvicorn refuses these with an HTTP response.
            await self._answer(refusal, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if path not in PROBES:
            host = self._check_host(headers.getlist("host"))
            self._check_origin(headers.getlist("origin"), host)
        if self._keys and needs_key(path):
            socket_key = _key_in_subprotocol(scope.get("subprotocols", ()))
            offered = headers.getlist("authorization")
            if path.startswith(AUTOMATIC1111):
                offered = [_bearer_of_basic(one) for one in offered]
            key = self._key(socket_key or offered)
            scope.setdefault("state", {})["api_key"] = key
        announced = headers.get("content-length", "0")
        max_bytes = self._body_bytes if scope.get("method") in WITH_BODY else BODILESS_BYTES
        if not announced.isdecimal() or int(announced) > max_bytes:
            raise TooLarge.body(max_bytes)

    def _check_host(self, values: Sequence[str]) -> tuple[str, str]:
        match = _HOST.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            raise Forbidden("The request needs exactly one valid Host header.", field="host")
        name, port = match[1].lower().strip("[]"), match[2] or ""
        if not self._hosts & {name, "*"}:
            raise Forbidden(
                f"host {name!r} is not allowed; the operator can add it to WEFT_ALLOWED_HOSTS.",
                field="host",
            )
        return name, port

    def _check_origin(self, values: Sequence[str], host: tuple[str, str]) -> None:
        if not values or (len(values) == 1 and values[0].lower() in self._origins):
            return
        if len(values) > 1 or not self._same_site(values[0], host):
            raise Forbidden(
                f"origin {values[0][:100]!r} is not allowed; the operator can add it to "
                "WEFT_ALLOWED_ORIGINS.",
                field="origin",
            )

    def _same_site(self, origin: str, host: tuple[str, str]) -> bool:
        """Return whether a page came from this server: same port, and one of its allowed names."""
        name, port = host
        try:
            page = urlsplit(origin.lower())
            page_port = str(page.port or "")
        except ValueError:
            return False
        if page.scheme not in ("http", "https") or page.path or page.username is not None:
            return False
        return page_port == port and (page.hostname == name or page.hostname in self._hosts)

    def _key(self, values: Sequence[str]) -> ApiKey:
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        # Every key is compared, so that the time taken does not reveal which one matches.
        known = [one for one in self._keys if one.opens_for(key.strip())]
        if scheme.lower() != "bearer" or not known:
            raise Unauthorized("A valid API key is required; send 'Authorization: Bearer <key>'.")
        return known[0]


def needs_key(path: str) -> bool:
    """Return whether a path needs a key on a server with keys."""
    return path not in PUBLIC and not path.startswith(RESULTS)


def _bearer_of_basic(authorization: str) -> str:
    """Return the key that clients of AUTOMATIC1111 send as a password, for any user name."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        pair = base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        return "Bearer"
    return f"Bearer {pair.partition(':')[2]}"


def _key_in_subprotocol(offered: Sequence[str]) -> list[str]:
    """Return the key as an Authorization header: browsers cannot set that for a WebSocket."""
    for one in offered:
        if one.startswith(KEY_SUBPROTOCOL):
            encoded = one.removeprefix(KEY_SUBPROTOCOL)
            try:
                key = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            except ValueError:
                return ["Bearer"]
            return [f"Bearer {key.decode(errors='replace')}"]
    return []
