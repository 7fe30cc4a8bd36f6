"""`/v1/catalog`: what a request may name."""

from __future__ import annotations

from fastapi import APIRouter

from server.http.dependencies import ServiceDep
from server.requests.catalog import Catalog, catalog

__all__ = ["router"]

router = APIRouter(tags=["catalog"])


@router.get("/v1/catalog")
async def list_everything(service: ServiceDep) -> Catalog:
    """All that a request may choose, with its parameters and defaults, and the models."""
    return catalog(service.models())
