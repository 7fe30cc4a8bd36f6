"""`/sdapi/v1`: unloading and reloading of the model that a client has chosen.

Clients do this to free device memory for a language model on the same machine. The model is the one
that the client's requests use; it stays loaded while other clients use it.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.api_keys import ApiKey
from server.errors import Forbidden
from server.http.automatic1111.checkpoints import CheckpointsDep
from server.http.automatic1111.jobs import owner_of
from server.http.automatic1111.route import ERRORS, TolerantRoute
from server.http.dependencies import ServiceDep
from server.http.making import cancel_on_disconnect
from server.service.model_shelf import ModelShelf

__all__ = ["router"]

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"], route_class=TolerantRoute)


@router.post("/unload-checkpoint", responses=ERRORS)
async def unload_checkpoint(
    request: Request, service: ServiceDep, checkpoints: CheckpointsDep
) -> dict[str, Any]:
    """Unload the client's model if nothing uses it; the next request loads it again."""
    key: ApiKey | None = getattr(request.state, "api_key", None)
    if key is not None and not key.unloads:
        raise Forbidden(
            "This key may not unload models, which other keys use; the operator can allow it by "
            "`unload` in WEFT_API_KEYS."
        )
    service.ready_engine()
    work = service.ready_shelf().unload(checkpoints.of(owner_of(request)))
    await cancel_on_disconnect(request, work)
    return {}


@router.post("/reload-checkpoint", responses=ERRORS)
async def reload_checkpoint(
    request: Request, service: ServiceDep, checkpoints: CheckpointsDep
) -> dict[str, Any]:
    """Load the client's model, and respond once it is loaded."""
    service.ready_engine()
    work = _loaded(service.ready_shelf(), checkpoints.of(owner_of(request)))
    await cancel_on_disconnect(request, work)
    return {}


async def _loaded(shelf: ModelShelf, name: str | None) -> None:
    (await shelf.lend(name)).release()
