"""Dependencies shared by several routes; coroutines, as FastAPI runs plain functions in threads."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.api_keys import ApiKey
from server.engine.client import ANONYMOUS, Client
from server.service.service import Service

__all__ = ["IdentifierDep", "OwnerDep", "ServiceDep", "client_of", "owner_of"]


async def _service(request: Request) -> Service:
    return request.app.state.service


def client_of(request: Request) -> Client:
    """Return the client whose share of the device a request uses: its key's, or one for all."""
    key: ApiKey | None = getattr(request.state, "api_key", None)
    return ANONYMOUS if key is None else key.client


def owner_of(request: Request) -> str:
    """Return the owner of what a request makes: hexadecimal SHA-256 of its key, empty without."""
    key: ApiKey | None = getattr(request.state, "api_key", None)
    return "" if key is None else key.digest.hex()


async def _owner(request: Request) -> str:
    return owner_of(request)


async def _identifier(request: Request) -> str:
    return request.state.request_id


ServiceDep = Annotated[Service, Depends(_service)]
OwnerDep = Annotated[str, Depends(_owner)]
IdentifierDep = Annotated[str, Depends(_identifier)]
