"""What this installation offers, described by itself, and what a request gets that is silent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field, create_model

from guidance import RULES
from guidance.parts import PARTS, Part
from samplers import SAMPLERS, SPACINGS
from server.requests.choice import name_of
from server.requests.schema import (
    DEFAULT_STEPS,
    GenerateRequest,
    default_guidance,
    default_sampler,
)

__all__ = ["Catalog", "Choice", "Defaults", "Entry", "ModelEntry", "catalog"]


class Entry(BaseModel):
    """One thing that a request may choose: a sampler, a spacing, a rule, a policy, ..."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(
        description="Stands for its defaults in a request, if these have a `name`; else the "
        "request's field."
    )
    summary: str = Field(description="One line.")
    source: str = Field(description="Paper and equation.")
    parameters: dict[str, Any] = Field(description="JSON schema of its fields.")
    defaults: dict[str, Any] = Field(
        description="What a request says in full; fields left out have these values."
    )
    properties: dict[str, str | int | float | bool] = Field(
        description="What it declares of itself, at its defaults: order, evaluations, ..."
    )


class ModelEntry(BaseModel):
    """One hosted model."""

    model_config = ConfigDict(frozen=True)

    name: str
    revision: str = Field(description="Hash of its weights.")
    width: int = Field(description="Default, in pixels.")
    height: int = Field(description="Default, in pixels.")
    size_multiple: int = Field(description="Width and height are multiples of this.")
    max_tokens: int = Field(description="Longest prompt, in tokens.")
    statistics: tuple[str, ...] = Field(
        description="Guidance that there are statistics of this model for; samplers use them "
        "whose `properties` say so."
    )
    classifier: dict[str, tuple[str, ...]] = Field(
        description="Classes that `guidance.classifier.target` may name, by attribute."
    )


class Defaults(BaseModel):
    """What a request gets that leaves these fields out."""

    model_config = ConfigDict(frozen=True)

    n: int
    steps: int = Field(description="Unless the spacing has a number of its own.")
    sampler: dict[str, Any]
    guidance: dict[str, Any]
    guidance_by_sampler: dict[str, dict[str, Any]] = Field(
        description="By the name of samplers that are guided otherwise."
    )


class Choice(BaseModel):
    """One thing that a request chooses from a list of this catalog, for forms."""

    model_config = ConfigDict(frozen=True)

    entries: str = Field(description="The list's name in this catalog.")
    field: str = Field(description="Where a request says what it chose, as a dotted path.")
    title: str
    description: str
    most: int = Field(description="How many may be chosen; above 1 the field is a list.")
    blank: str | None = Field(
        description="What to call choosing none of them; null where one is always chosen."
    )


class _Offered(BaseModel):
    """Everything that a request may name, but for the parts of `guidance` beside its rule."""

    model_config = ConfigDict(frozen=True)

    samplers: tuple[Entry, ...] = Field(description="Choices of `sampler`.")
    spacings: tuple[Entry, ...] = Field(description="Choices of `spacing`.")
    rules: tuple[Entry, ...] = Field(description="Choices of `guidance`.")
    choices: tuple[Choice, ...] = Field(description="What a form offers, in its order.")
    defaults: Defaults
    models: tuple[ModelEntry, ...] = Field(description="Empty until they are loaded.")


if TYPE_CHECKING:
    Catalog = _Offered
else:
    Catalog = create_model(
        "Catalog",
        __base__=_Offered,
        __doc__="Everything that a request may name.",
        **{
            part.plural: (
                tuple[Entry, ...],
                Field(description=f"Choices of `guidance.{part.field}`. {part.description}"),
            )
            for part in PARTS
        },
    )


def catalog(models: tuple[ModelEntry, ...] = ()) -> Catalog:
    """The catalog of what is installed, with the models that are hosted."""
    parts = {part.plural: _entries_of(part) for part in PARTS}
    return Catalog(
        samplers=_entries(SAMPLERS),
        spacings=_entries(SPACINGS),
        rules=_entries(RULES),
        choices=CHOICES,
        defaults=_defaults(),
        models=models,
        **parts,
    )


CHOICES: Final = (
    Choice(
        entries="samplers",
        field="sampler",
        title="Sampler",
        description="How the noise is removed.",
        most=1,
        blank=None,
    ),
    Choice(
        entries="spacings",
        field="spacing",
        title="Spacing",
        description="At which noise levels the steps are.",
        most=1,
        blank="the sampler's own",
    ),
    Choice(
        entries="rules",
        field="guidance",
        title="Guidance",
        description="How the predictions for prompt and negative prompt are combined.",
        most=1,
        blank=None,
    ),
    *(
        Choice(
            entries=part.plural,
            field=f"guidance.{part.field}",
            title=part.label[:1].upper() + part.label[1:],
            description=part.description,
            most=part.most,
            blank="off" if part.default is None else None,
        )
        for part in PARTS
    ),
)


def _entries_of(part: Part) -> tuple[Entry, ...]:
    if part.named:
        return _entries(part.kinds)
    return tuple(_entry(kind, part.field) for kind in part.kinds)


@cache
def _defaults() -> Defaults:
    plain = default_guidance(default_sampler()).model_dump(mode="json")
    samplers = [member.model_validate({}) for member in SAMPLERS]
    guidance = {one.name: default_guidance(one).model_dump(mode="json") for one in samplers}
    return Defaults(
        n=GenerateRequest.model_fields["n"].default,
        steps=DEFAULT_STEPS,
        sampler=default_sampler().model_dump(mode="json"),
        guidance=plain,
        guidance_by_sampler={name: own for name, own in guidance.items() if own != plain},
    )


def _entries(members: Sequence[type[BaseModel]]) -> tuple[Entry, ...]:
    return tuple(_entry(member, name_of(member)) for member in members)


@cache
def _entry(member: type[BaseModel], name: str) -> Entry:
    defaults = member()
    properties = {
        declared: value
        for declared in _declared(member)
        if isinstance(value := getattr(defaults, declared), str | int | float | bool)
    }
    summary, source = (str(properties.pop(text)) for text in ("summary", "source"))
    return Entry(
        name=name,
        summary=summary,
        source=source,
        parameters=member.model_json_schema(),
        defaults=defaults.model_dump(mode="json"),
        properties=properties,
    )


def _declared(member: type[BaseModel]) -> list[str]:
    """Names of the class attributes and properties that a class declares, parents' first."""
    names: dict[str, None] = {}
    for kind in reversed(member.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        constants = kind.__class_vars__
        computed = {name for name, value in vars(kind).items() if isinstance(value, property)}
        names |= dict.fromkeys(sorted(n for n in constants | computed if not n.startswith("_")))
    return list(names)
