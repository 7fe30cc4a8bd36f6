"""Dependencies that several routes share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.service.service import Service

__all__ = ["IdentifierDep", "ServiceDep"]


def _service(request: Request) -> Service:
    return request.app.state.service


def _identifier(request: Request) -> str:
    return request.state.request_id


ServiceDep = Annotated[Service, Depends(_service)]
IdentifierDep = Annotated[str, Depends(_identifier)]
