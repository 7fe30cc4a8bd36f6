"""Field types for instances of registered classes, given by name or as an object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import BaseModel, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from server.plugin_faults import containing_exits

__all__ = ["choice", "listed", "name_of"]


def name_of(member: type[BaseModel]) -> str:
    """Return the name of a registered class in requests."""
    return member.model_fields["name"].default


def listed(names: Sequence[str]) -> str:
    """Join names to a comma-separated list."""
    return ", ".join(names)


@dataclass(frozen=True, slots=True)
class _NameOrObject:
    """A validator that turns a bare name into an object with its defaults, if the name is known."""

    field: str
    names: tuple[str, ...]
    elsewhere: Callable[[str], str | None]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        by_name = {
            "type": "string",
            "enum": list(self.names),
            "description": "A bare name selects its defaults.",
        }
        return {"anyOf": [by_name, handler(schema)]}

    def _read(self, value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
        # Runs the validators that a plug-in's class defines.
        with containing_exits():
            return validate(self._expand(value))

    def _expand(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, dict):
            if "name" not in value:
                raise self._refused(f"{self.field} is an object without a 'name'")
            self._check(value["name"])
            return value
        self._check(value)
        return {"name": value}

    def _check(self, name: Any) -> None:
        if not isinstance(name, str):
            raise self._refused(f"{self.field} is neither a name nor an object with a 'name'")
        if name not in self.names:
            raise self._refused(self.elsewhere(name) or f"{self.field} {name[:60]!r} is unknown")

    def _refused(self, what: str) -> PydanticCustomError:
        return PydanticCustomError(
            "sentence",
            "{what}; allowed are: {allowed}.",  # type: ignore[arg-type]
            {"what": what, "allowed": listed(self.names)},
        )


def choice(
    field: str,
    members: Sequence[type[BaseModel]],
    elsewhere: Callable[[str], str | None] = lambda _: None,
) -> Any:
    """Return the type of a field for an instance of one of `members`, distinguished by `name`.

    Args:
        field: name of the field in error messages.
        members: frozen models with a `name` literal.
        elsewhere: function that explains a name of another program; returns None for other names.
    """
    names = tuple(name_of(member) for member in members)
    union = Union[tuple(members)]  # noqa: UP007 - the members are known at run time only
    apart = (Discriminator("name"),) if len(members) > 1 else ()
    return Annotated[union, *apart, _NameOrObject(field, names, elsewhere)]
