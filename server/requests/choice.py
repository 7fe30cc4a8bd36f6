"""A field that takes one of a registry's classes, by bare name or by object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import BaseModel, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

__all__ = ["choice", "listed", "name_of"]


def name_of(member: type[BaseModel]) -> str:
    """The name that users call a registered class by."""
    return member.model_fields["name"].default


def listed(names: Sequence[str]) -> str:
    """The names as a sentence ends with them."""
    return ", ".join(names)


@dataclass(frozen=True, slots=True)
class _NameOrObject:
    """Turns a bare name into an object of defaults, and answers an unknown one in a sentence."""

    field: str
    names: tuple[str, ...]
    elsewhere: Callable[[str], str | None]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._expand, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        by_name = {
            "type": "string",
            "enum": list(self.names),
            "description": "A bare name stands for its defaults.",
        }
        return {"anyOf": [by_name, handler(schema)]}

    def _expand(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, dict):
            if "name" not in value:
                raise self._refused(f"{self.field} is an object without 'name'")
            self._check(value["name"])
            return value
        self._check(value)
        return {"name": value}

    def _check(self, name: Any) -> None:
        if not isinstance(name, str):
            raise self._refused(f"{self.field} is neither a name nor an object with 'name'")
        if name not in self.names:
            raise self._refused(self.elsewhere(name) or f"{self.field} {name[:60]!r} is not known")

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
    """The type of a field that takes one of `members`, told apart by `name`.

    Args:
        field: its name, as error sentences call it.
        members: frozen models with a `name` literal.
        elsewhere: what to say of a name that other programs use, or None.
    """
    names = tuple(name_of(member) for member in members)
    union = Union[tuple(members)]  # noqa: UP007 - the members are known at run time only
    apart = (Discriminator("name"),) if len(members) > 1 else ()
    return Annotated[union, *apart, _NameOrObject(field, names, elsewhere)]
