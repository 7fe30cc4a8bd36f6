"""`/controlnet`: routes of AUTOMATIC1111's ControlNet extension other than generation."""

from __future__ import annotations

import base64
from asyncio import to_thread
from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidRequest
from server.http.automatic1111.route import ERRORS, TolerantRoute
from server.http.dependencies import ServiceDep
from server.image_codec import encode
from server.requests.automatic1111_controlnet import MODULES, module_of
from server.requests.controls import MAX_CONTROLS
from server.requests.upload import Upload
from server.service.service import Service

__all__ = ["router"]

API_VERSION: Final = 3

router = APIRouter(prefix="/controlnet", tags=["automatic1111"], route_class=TolerantRoute)


class Detect(BaseModel):
    """A request of the extension's `POST /controlnet/detect`; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    controlnet_module: str = Field(default="none", max_length=128, description="`invert`.")
    controlnet_input_images: tuple[Upload, ...] = Field(
        min_length=1,
        max_length=MAX_CONTROLS,
        repr=False,
        description="PNG, JPEG or WebP in base64.",
    )


class Detected(BaseModel):
    """The preprocessed pictures."""

    images: list[str] = Field(description="PNG in base64.")
    info: str = "Success"


@router.get("/version")
async def version() -> dict[str, int]:
    """The version of the extension's API."""
    return {"version": API_VERSION}


@router.get("/model_list")
async def model_list(service: ServiceDep) -> dict[str, list[str]]:
    """The ControlNets and IP-Adapters of all models, for `model` of a unit."""
    return {"model_list": await to_thread(_names, service)}


@router.get("/module_list")
async def module_list() -> dict[str, Any]:
    """The supported preprocessors, for `module` of a unit."""
    detail = {"model_free": False, "sliders": []}
    return {"module_list": list(MODULES), "module_detail": dict.fromkeys(MODULES, detail)}


@router.get("/control_types")
async def control_types(service: ServiceDep) -> dict[str, Any]:
    """All models and preprocessors as one control type, since names do not tell the types."""
    every = {
        "module_list": list(MODULES),
        "model_list": ["None", *await to_thread(_names, service)],
        "default_option": "none",
        "default_model": "None",
    }
    return {"control_types": {"All": every}}


@router.get("/settings")
async def settings() -> dict[str, int]:
    """The maximum number of units in a request."""
    return {"control_net_unit_count": MAX_CONTROLS}


@router.post("/detect", responses=ERRORS)
async def detect(body: Detect, request: Request, service: ServiceDep) -> Detected:
    """Preprocess pictures for ControlNets."""
    module = module_of(body.controlnet_module)
    if module not in ("none", "invert"):
        raise InvalidRequest(
            "controlnet_module",
            f"controlnet_module is {body.controlnet_module[:60]!r}; allowed are: none, invert.",
        )
    images: list[str] = []
    for place, upload in enumerate(body.controlnet_input_images):
        with upload.opened() as data:
            picture = await service.decoding.picture(data, f"controlnet_input_images.{place}")
        request.state.share.hold(picture.nbytes)
        if module == "invert":
            picture = 255 - picture
        images.append(base64.b64encode(await to_thread(encode, picture, "png")).decode())
    return Detected(images=images)


def _names(service: Service) -> list[str]:
    entries = service.models()
    found = [one.name for entry in entries for one in (*entry.controls, *entry.image_prompts)]
    return list(dict.fromkeys(found))
