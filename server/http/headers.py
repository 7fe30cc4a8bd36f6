"""Headers that tell browsers to take an answer for nothing but what it is declared as."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SafeHeaders", "make_safe"]

NOTHING: Final = "default-src 'none'; frame-ancestors 'none'"
"""For answers that are no page: were one shown as a page, it would load and run nothing."""

STARTS: Final = ("http.response.start", "websocket.http.response.start")


def make_safe(headers: MutableHeaders) -> None:
    """Forbid guesses at the content's type, and whatever the answer does not allow itself."""
    headers["x-content-type-options"] = "nosniff"
    headers.setdefault("content-security-policy", NOTHING)


class SafeHeaders:
    """Gives every response these headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def send_safely(message: Message) -> None:
            if message["type"] in STARTS:
                make_safe(MutableHeaders(scope=message))
            await send(message)

        await self._app(scope, receive, send_safely)
