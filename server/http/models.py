"""`/v1/models`: the hosted models, as OpenAI's clients list them."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from server.errors import UnknownModel
from server.http.dependencies import ServiceDep
from server.http.errors import ErrorBody
from server.service.service import Service

__all__ = ["router"]

router = APIRouter(tags=["openai"])


class Model(BaseModel):
    """One hosted model."""

    id: str = Field(description="Its name, for `model` in requests.")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time at which the server started.")
    owned_by: Literal["weft"] = "weft"


class Models(BaseModel):
    """All hosted models; the first is the default."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models")
def list_models(service: ServiceDep) -> Models:
    """The hosted models, the default one first; none while they are loading."""
    return Models(data=_models(service))


@router.get("/v1/models/{name:path}", responses={404: {"model": ErrorBody}})
def read_model(name: Annotated[str, Path(max_length=256)], service: ServiceDep) -> Model:
    """One hosted model."""
    models = {model.id: model for model in _models(service)}
    if name not in models:
        raise UnknownModel(name[:60], models)
    return models[name]


def _models(service: Service) -> list[Model]:
    return [Model(id=entry.name, created=int(service.started)) for entry in service.models()]
