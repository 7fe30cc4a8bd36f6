"""Headers that keep browsers from treating a response as anything but its declared type."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SafeHeaders", "set_security_headers"]

STRICT_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
"""Content security policy of responses that are not pages: if shown as a page, they can load and
run nothing."""

STARTS: Final = ("http.response.start", "websocket.http.response.start")


def set_security_headers(headers: MutableHeaders) -> None:
    """Forbid content sniffing, and set the strictest policy unless the response has its own."""
    headers["x-content-type-options"] = "nosniff"
    headers.setdefault("content-security-policy", STRICT_POLICY)


class SafeHeaders:
    """Gives every response these headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def send_safely(message: Message) -> None:
            if message["type"] in STARTS:
                set_security_headers(MutableHeaders(scope=message))
            await send(message)

        await self._app(scope, receive, send_safely)
