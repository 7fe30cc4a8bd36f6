"""HEAD, which load balancers and monitors send: the response of GET without its body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HeadAsGet"]


class HeadAsGet:
    """Middleware by which every route that answers GET answers HEAD too (RFC 9110, section 9.3.2).

    The server drops the body of the response, because only the application sees another method.
    A stream is left at the first part of its body.

    Args:
        app: application that serves the request as GET.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                await send({"type": "http.response.body"})
                if message.get("more_body"):
                    raise _Answered
                return
            await send(message)

        try:
            await self._app({**scope, "method": "GET"}, receive, without_body)
        except _Answered:
            return


class _Answered(Exception):
    """The client has the headers, and gets nothing else."""
