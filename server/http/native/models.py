"""`/v1/models`: the models of the server and their state."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from server.errors import UnknownModel
from server.http.dependencies import ServiceDep
from server.http.errors import ErrorBody
from server.models.compiling.model_blocks import compilation_of
from server.models.hosted import HostedModel
from server.service.model_shelf import ModelState

__all__ = ["ModelCard", "ModelList", "card_of", "router"]

router = APIRouter(tags=["openai"])

_UNKNOWN: Final[dict[int | str, dict[str, Any]]] = {404: {"model": ErrorBody}}


class CompilationCard(BaseModel):
    """State of compilation of the repeated blocks of a denoiser."""

    model_config = ConfigDict(frozen=True)

    compiled: int = Field(description="Shapes of blocks that run compiled.")
    waiting: int = Field(description="Shapes of blocks that are being compiled.")
    eager: int = Field(description="Shapes of blocks that run eagerly, as compiling did not help.")
    reason: str | None = Field(
        description="Why the last of these runs eagerly, or why none is compiled."
    )


class ModelCard(BaseModel):
    """One model, with the fields of OpenAI's API and some of its own."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="Its name in a request.")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time at which its files were made.")
    owned_by: Literal["weft"] = "weft"
    default: bool = Field(description="Whether requests that name no model get this one.")
    loaded: bool = Field(
        description="Whether it is in memory; a request for a model that is not waits until it is "
        "loaded."
    )
    loading: float | None = Field(
        description="Share of its weights that has been read, from 0 to 1, while it is being "
        "loaded."
    )
    memory_bytes: int = Field(
        description="Device memory that its weights take; 0 if it is not loaded."
    )
    offloaded_bytes: int = Field(description="Host memory that its offloaded weights take.")
    loaded_since: float | None = Field(
        description="Unix time at which it was loaded; null if it is not."
    )
    device: str | None = Field(description="Device that it is on; null if it is not loaded.")
    dtype: str | None = Field(description="Dtype of its weights; null if it is not loaded.")
    quantization: str | None = Field(
        description="`none`, or the type of the weights in the blocks of its denoiser and text "
        "encoders: `int8`, `fp8` or `nf4`; null if it is not loaded."
    )
    gguf_types: tuple[str, ...] = Field(
        description="Types of the blocks in the GGUF file of its denoiser, by ggml's names, the "
        "type of most weights first; empty without such a file, or if it is not loaded."
    )
    denoiser: str | None = Field(
        description="Name of the file of the U-Net or transformer that replaces its own; null for "
        "its own, or if it is not loaded."
    )
    vae: str | None = Field(
        description="Name of the autoencoder that replaces its own; null for its own, or if it is "
        "not loaded."
    )
    tiny_vae: str | None = Field(
        description="Name of the tiny autoencoder of requests with the `autoencoder` `tiny`; null "
        "if there is none, or if the model is not loaded."
    )
    offload: str | None = Field(
        description="What stays in host memory and is copied to the device as it runs: `none`, "
        "`text` for its text encoders, `all` for its denoiser too; null if it is not loaded."
    )
    attention: str | None = Field(
        description="Kernels of its attention; null if it is not loaded. `sdpa` stands for those "
        "that torch's scaled_dot_product_attention chooses."
    )
    memory_format: str | None = Field(
        description="Memory format of its denoiser's activations, by torch's name: `channels_last` "
        "for U-Nets, whose convolutions are then faster, else `contiguous_format`; null if it is "
        "not loaded."
    )
    compilation: CompilationCard | None = Field(
        description="State of compilation of its denoiser; null if it is not loaded, or if the "
        "server was started without `compile`."
    )
    forward_rows: tuple[int, ...] = Field(
        description="Numbers of rows that its forward passes at its default size are padded to, as "
        "the first pass with a number is slow on a GPU; empty on a CPU, where passes are not "
        "padded."
    )
    recorded_rows: tuple[int, ...] = Field(
        description="Numbers of rows whose forward passes are replayed from CUDA graphs because "
        "that was measured to be faster."
    )


class ModelList(BaseModel):
    """All models of the server, the default one first."""

    model_config = ConfigDict(frozen=True)

    object: Literal["list"] = "list"
    data: tuple[ModelCard, ...]


def card_of(state: ModelState) -> ModelCard:
    """Return the entry for a model in the list."""
    model = state.model
    return ModelCard(
        id=state.name,
        created=state.created,
        default=state.default,
        loaded=model is not None,
        loading=state.loading,
        memory_bytes=state.memory_bytes,
        offloaded_bytes=state.offloaded_bytes,
        loaded_since=state.loaded_since,
        device=None if model is None else str(model.device),
        dtype=None if model is None else str(model.dtype).removeprefix("torch."),
        quantization=None if model is None else model.placement.quantization,
        gguf_types=() if model is None else model.gguf_types,
        denoiser=None if model is None else model.facts.given_denoiser,
        vae=None if model is None else model.facts.vae,
        tiny_vae=None if model is None else model.facts.tiny_vae,
        offload=None if model is None else model.placement.offload,
        attention=None if model is None else model.attention,
        memory_format=None if model is None else model.memory_format,
        compilation=None if model is None else _compilation_of(model),
        forward_rows=state.prepared.rows,
        recorded_rows=state.prepared.recorded,
    )


def _compilation_of(model: HostedModel) -> CompilationCard | None:
    made = compilation_of(model)
    return None if made is None else CompilationCard.model_validate(made._asdict())


@router.get("/v1/models")
def list_models(service: ServiceDep) -> ModelList:
    """The models that requests may name, loaded or not; empty until the server has loaded."""
    return ModelList(data=tuple(map(card_of, service.model_states())))


@router.get("/v1/models/{name:path}", responses=_UNKNOWN)
def read_model(name: Annotated[str, Path(max_length=256)], service: ServiceDep) -> ModelCard:
    """One model."""
    states = {state.name: state for state in service.model_states()}
    if name not in states:
        raise UnknownModel(name[:60], states)
    return card_of(states[name])
