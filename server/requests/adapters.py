"""The field `adapters` of a request: LoRAs and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import WithJsonSchema

from server.errors import AdapterMismatch, InvalidRequest
from server.models.adapters.adapter import Weighted

if TYPE_CHECKING:
    from server.models.adapters.adapter_file import AdapterFile
    from server.models.hosted import HostedModel

__all__ = ["AdapterChoices", "WeightedName", "check_adapters", "load_adapters"]

MAX_ADAPTERS: Final = 8
STRONGEST: Final = 4.0


class WeightedName(BaseModel):
    """One adapter of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        min_length=1,
        max_length=128,
        description="Name of an adapter, as the catalog lists it for the model.",
    )
    weight: float = Field(
        default=1.0,
        ge=-STRONGEST,
        le=STRONGEST,
        strict=True,
        description="Factor on what the adapter changes; 0 switches it off.",
    )


def _one(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_OBJECT: Final = WeightedName.model_json_schema()
_BY_NAME: Final = {"type": "string", "description": "A bare name has the weight 1."}

_Entry = Annotated[WeightedName, BeforeValidator(_one)]
AdapterChoices: TypeAlias = Annotated[
    tuple[_Entry, ...],
    BeforeValidator(_listed),
    WithJsonSchema(
        {
            "anyOf": [
                _BY_NAME,
                {
                    "type": "array",
                    "maxItems": MAX_ADAPTERS,
                    "items": {"anyOf": [_BY_NAME, _OBJECT]},
                },
            ]
        }
    ),
]
"""Adapters by name or as objects, in the order in which they are added."""


def check_adapters(chosen: Sequence[WeightedName], model: HostedModel) -> tuple[AdapterFile, ...]:
    """Return the files of a request's adapters.

    Raises:
        InvalidRequest: an adapter is named twice or does not belong to the model, or they can never
            be in memory at once.
    """
    files: list[AdapterFile] = []
    for place, one in enumerate(chosen):
        field = f"adapters.{place}.name"
        if one.name in {file.name for file in files}:
            raise InvalidRequest(field, f"{field} is {one.name!r}, which is named twice.")
        try:
            files.append(model.adapters.find(one.name))
        except AdapterMismatch as refusal:
            raise InvalidRequest(field, f"{field}: {refusal.message}") from None
    try:
        model.adapters.check_together(
            file for file, one in zip(files, chosen, strict=True) if one.weight
        )
    except AdapterMismatch as refusal:
        raise InvalidRequest("adapters", f"adapters: {refusal.message}") from None
    return tuple(files)


def load_adapters(chosen: Sequence[WeightedName], model: HostedModel) -> tuple[Weighted, ...]:
    """Load the adapters of a checked request.

    Raises:
        InvalidRequest: a file was changed or removed after the check.
        Overloaded: the adapters of running requests leave no room.
    """
    loaded: list[Weighted] = []
    for place, one in enumerate(chosen):
        if one.weight == 0:
            continue
        try:
            loaded.append(Weighted(model.adapters.load(one.name), one.weight))
        except AdapterMismatch as refusal:
            field = f"adapters.{place}.name"
            raise InvalidRequest(field, f"{field}: {refusal.message}") from None
    return tuple(loaded)
