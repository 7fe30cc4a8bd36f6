"""Dependencies that several routes share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.errors import UnsupportedMediaType
from server.service.service import Service

__all__ = ["IdentifierDep", "ServiceDep", "json_only"]


def _service(request: Request) -> Service:
    return request.app.state.service


def _identifier(request: Request) -> str:
    return request.state.request_id


def json_only(request: Request) -> None:
    """Refuse a body not declared as JSON, since any web page can send other types unasked."""
    declared = request.headers.get("content-type", "")
    if declared.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(
            "content-type", f"content-type is {declared[:60]!r}; it must be application/json."
        )


ServiceDep = Annotated[Service, Depends(_service)]
IdentifierDep = Annotated[str, Depends(_identifier)]
