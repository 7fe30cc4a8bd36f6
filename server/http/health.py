"""`/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.http.dependencies import ServiceDep

__all__ = ["router"]

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez(service: ServiceDep) -> JSONResponse:
    """Liveness of the process: 503 once it can never serve again."""
    if service.broken is not None:
        return JSONResponse({"status": "broken", "reason": service.broken}, 503)
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
async def readyz(service: ServiceDep, request: Request) -> JSONResponse:
    """Readiness for requests: 200 if the models are loaded and warmed up.

    It stays 200 while the database of durable jobs cannot be reached, which `degraded` then says:
    other requests do not need it, and every server that shares it is affected alike.
    """
    service.ready_engine()
    jobs = request.app.state.jobs
    if jobs is not None and not jobs.reachable:
        degraded = {"predictions": "The database of durable jobs cannot be reached."}
        return JSONResponse({"status": "ready", "degraded": degraded})
    return JSONResponse({"status": "ready"})


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"description": "Metrics, one per line.", "content": {"text/plain": {}}}},
)
def metrics(request: Request) -> Response:
    """Counters and histograms in the Prometheus text format."""
    return Response(request.app.state.exposition(), media_type=CONTENT_TYPE_LATEST)
