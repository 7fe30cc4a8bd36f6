"""`/v1/catalog`: everything that requests can choose from."""

from __future__ import annotations

from fastapi import APIRouter

from server.http.dependencies import ServiceDep
from server.requests.catalog import Catalog, catalog

__all__ = ["router"]

router = APIRouter(tags=["catalog"])


@router.get("/v1/catalog")
def read_catalog(service: ServiceDep) -> Catalog:
    """Samplers, spacings and guidance with their parameters and defaults, and the models."""
    return catalog(service.models())
