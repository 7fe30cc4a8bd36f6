"""Dependencies that several routes share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.api_keys import ApiKey
from server.engine.client import ANYONE, Client
from server.service.service import Service

__all__ = ["IdentifierDep", "ServiceDep", "client_of"]


def _service(request: Request) -> Service:
    return request.app.state.service


def client_of(request: Request) -> Client:
    """Whose share of the device a request has: its key's; without keys everybody's."""
    key: ApiKey | None = getattr(request.state, "api_key", None)
    return ANYONE if key is None else key.client


def _identifier(request: Request) -> str:
    return request.state.request_id


ServiceDep = Annotated[Service, Depends(_service)]
IdentifierDep = Annotated[str, Depends(_identifier)]
