"""`/sdapi/v1`: lists, options and other routes that AUTOMATIC1111's clients call."""

from __future__ import annotations

import os
import resource
import sys
from asyncio import to_thread
from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.errors import CaptionsOff
from server.http.automatic1111.checkpoints import CheckpointsDep, chosen, named
from server.http.automatic1111.jobs import owner_of
from server.http.automatic1111.route import ERRORS, TolerantRoute
from server.http.dependencies import ServiceDep
from server.requests.automatic1111_hires import LATENT_UPSCALERS, UPSCALERS
from server.requests.automatic1111_names import sampler_labels, schedule_labels
from server.requests.read_infotext import read_infotext
from server.requests.upload import Upload
from server.service.model_shelf import ModelState

__all__ = ["router"]

router = APIRouter(tags=["automatic1111"], route_class=TolerantRoute)

EMPTY: Final[dict[str, Any]] = {
    "/internal/ping": {},
    "/sdapi/v1/cmd-flags": {},
    "/sdapi/v1/extensions": [],
    "/sdapi/v1/face-restorers": [],
    "/sdapi/v1/hypernetworks": [],
    "/sdapi/v1/prompt-styles": [],
    "/sdapi/v1/realesrgan-models": [],
}
"""Empty responses, by path, for things that this server does not have."""

SCRIPTS: Final = {"txt2img": ["controlnet"], "img2img": ["controlnet"]}
"""Supported scripts of `alwayson_scripts`, by route."""


class Options(BaseModel):
    """The supported settings; a client may send back all others unchanged."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sd_model_checkpoint: str | None = Field(
        default=None, max_length=256, description="The model of this client's requests."
    )


class PngInfo(BaseModel):
    """An image file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image: Upload = Field(description="PNG, JPEG or WebP in base64.")


class Interrogation(BaseModel):
    """An image to be described; its fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class PngInfoAnswer(BaseModel):
    """The generation settings that an image file contains."""

    info: str = Field(description="Its infotext; empty if it has none.")
    items: dict[str, str] = Field(description="Its other texts, by name.")
    parameters: dict[str, str] = Field(description="The fields of the infotext.")


@router.get("/sdapi/v1/options")
async def options(
    request: Request, service: ServiceDep, checkpoints: CheckpointsDep
) -> dict[str, Any]:
    """The settings of this client."""
    state = chosen(checkpoints.of(owner_of(request)), await to_thread(service.model_states))
    return {
        "sd_model_checkpoint": None if state is None else state.name,
        "sd_checkpoint_hash": None if state is None else _revision(state),
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
    }


@router.post("/sdapi/v1/options", responses=ERRORS)
async def set_options(
    body: Options, request: Request, service: ServiceDep, checkpoints: CheckpointsDep
) -> dict[str, Any]:
    """Choose the model of this client's requests."""
    if body.sd_model_checkpoint:
        name = named(body.sd_model_checkpoint, await to_thread(service.model_states))
        checkpoints.choose(owner_of(request), name)
    return {}


@router.get("/sdapi/v1/sd-models")
async def sd_models(service: ServiceDep) -> list[dict[str, Any]]:
    """The models of the server; those that are not loaded have no hash yet."""
    return [
        {
            "title": state.name,
            "model_name": state.name,
            "hash": (_revision(state) or "")[:10] or None,
            "sha256": _revision(state),
            "filename": state.name,
            "config": None,
        }
        for state in await to_thread(service.model_states)
    ]


@router.get("/sdapi/v1/samplers")
async def samplers() -> list[dict[str, Any]]:
    """Samplers: AUTOMATIC1111's and Forge's that have an equivalent here, and this server's own."""
    return [
        {"name": label, "aliases": list(aliases), "options": {}}
        for label, aliases in sampler_labels().items()
    ]


@router.get("/sdapi/v1/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """Schedule types: AUTOMATIC1111's and Forge's, and this server's own spacings."""
    return [
        {
            "name": label.casefold().replace(" ", "_"),
            "label": label,
            "aliases": [],
            "default_rho": -1,
            "need_inner_model": False,
        }
        for label in ("Automatic", *schedule_labels())
    ]


@router.get("/sdapi/v1/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """The upscalers for the high-resolution pass and `extra-single-image`."""
    named = {"model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    return [{"name": name, **named} for name in UPSCALERS]


@router.get("/sdapi/v1/latent-upscale-modes")
async def latent_upscale_modes() -> list[dict[str, Any]]:
    """The latent upscalers for the high-resolution pass."""
    return [{"name": name} for name in LATENT_UPSCALERS]


@router.get("/sdapi/v1/loras")
async def loras(service: ServiceDep) -> list[dict[str, Any]]:
    """The adapters of all models, for `<lora:name:weight>` in a prompt."""
    entries = await to_thread(service.models)
    names = dict.fromkeys(one.name for entry in entries for one in entry.adapters)
    return [
        {"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}}
        for name in names
    ]


@router.get("/sdapi/v1/sd-modules")
@router.get("/sdapi/v1/sd-vae")
async def sd_vae(service: ServiceDep) -> list[dict[str, str]]:
    """The autoencoders that replace models' own ones; requests cannot choose them.

    Forge calls these modules.
    """
    names = dict.fromkeys(one.vae for one in await to_thread(service.models) if one.vae)
    return [{"model_name": name, "filename": name} for name in names]


@router.get("/sdapi/v1/embeddings")
async def embeddings(service: ServiceDep) -> dict[str, dict[str, Any]]:
    """The textual inversion embeddings that prompts may name, and those that fit no model."""
    entries = await to_thread(service.models)
    loaded = {one.name: one for entry in entries for one in entry.embeddings}
    unfit = {name: why for entry in entries for name, why in entry.unfit_embeddings.items()}
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {
        "loaded": {
            name: {**unknown, "shape": one.width, "vectors": one.vectors}
            for name, one in loaded.items()
        },
        "skipped": {
            name: {**unknown, "shape": None, "vectors": 0, "reason": why}
            for name, why in unfit.items()
            if name not in loaded
        },
    }


@router.get("/sdapi/v1/scripts")
async def scripts() -> dict[str, list[str]]:
    """The supported scripts of `alwayson_scripts`."""
    return SCRIPTS


@router.get("/sdapi/v1/script-info")
async def script_info() -> list[dict[str, Any]]:
    """The same scripts, one entry each; the arguments of ControlNet are units, not sliders."""
    return [
        {"name": name, "is_alwayson": True, "is_img2img": kind == "img2img", "args": []}
        for kind, names in SCRIPTS.items()
        for name in names
    ]


@router.get("/sdapi/v1/memory")
async def memory() -> dict[str, Any]:
    """The memory of the machine and the peak memory of this process, in bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "ram": {"free": total - used, "used": used, "total": total},
        "cuda": {"error": "not reported here; see /metrics"},
    }


@router.post("/sdapi/v1/png-info", responses=ERRORS)
async def png_info(body: PngInfo, service: ServiceDep) -> PngInfoAnswer:
    """Read the settings that an image file contains."""
    with body.image.opened() as data:
        texts = await service.decoding.texts(data, "image")
    text = texts.pop("parameters", "")
    return PngInfoAnswer(info=text, items=texts, parameters=read_infotext(text) if text else {})


@router.post("/sdapi/v1/interrogate", responses=ERRORS)
async def interrogate(body: Interrogation) -> None:
    """Refuse to describe an image: no model on this server can."""
    del body
    raise CaptionsOff


@router.get("/sdapi/v1/interrogate", responses=ERRORS)
async def whether_it_interrogates() -> None:
    """Refuse as well: clients probe the route with GET, and 405 would mean that it exists."""
    raise CaptionsOff


@router.post("/sdapi/v1/refresh-checkpoints")
@router.post("/sdapi/v1/refresh-embeddings")
@router.post("/sdapi/v1/refresh-loras")
@router.post("/sdapi/v1/refresh-vae")
async def refresh() -> dict[str, Any]:
    """Do nothing: folders are read whenever they are listed."""
    return {}


def _revision(state: ModelState) -> str | None:
    return None if state.model is None else state.model.facts.revision


def _serve(path: str, listed: Any) -> None:
    @router.get(path, name=path)
    async def nothing() -> Any:
        """An empty response: this server has none."""
        return listed


for _path, _listed in EMPTY.items():
    _serve(_path, _listed)
