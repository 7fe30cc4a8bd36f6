"""What this installation offers, described by itself, and what a request gets that is silent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from guidance import (
    CLASSIFIERS,
    PERTURBATIONS,
    POLICIES,
    RULES,
    FeynmanKac,
    NegToMe,
    SkipTuning,
)
from samplers import SAMPLERS, SPACINGS
from server.requests.choice import name_of
from server.requests.schema import (
    DEFAULT_STEPS,
    GenerateRequest,
    default_guidance,
    default_sampler,
)

__all__ = ["Catalog", "Defaults", "Entry", "ModelEntry", "catalog"]


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


class Catalog(BaseModel):
    """Everything that a request may name."""

    model_config = ConfigDict(frozen=True)

    samplers: tuple[Entry, ...] = Field(description="Of `sampler`.")
    spacings: tuple[Entry, ...] = Field(description="Of `spacing`; the sampler's own by default.")
    rules: tuple[Entry, ...] = Field(description="Of `guidance`.")
    policies: tuple[Entry, ...] = Field(description="Of `guidance.policy`.")
    perturbations: tuple[Entry, ...] = Field(description="Of the list `guidance.perturbed`.")
    classifiers: tuple[Entry, ...] = Field(
        description="Of `guidance.classifier`, terms that a model's classifier adds."
    )
    skip_tuning: tuple[Entry, ...] = Field(description="Of `guidance.skip_tuning`.")
    particles: tuple[Entry, ...] = Field(description="Of `guidance.particles`.")
    negtome: tuple[Entry, ...] = Field(description="Of `guidance.negtome`.")
    defaults: Defaults
    models: tuple[ModelEntry, ...] = Field(description="Empty until they are loaded.")


def catalog(models: tuple[ModelEntry, ...] = ()) -> Catalog:
    """The catalog of what is installed, with the models that are hosted."""
    return Catalog(
        samplers=_entries(SAMPLERS),
        spacings=_entries(SPACINGS),
        rules=_entries(RULES),
        policies=_entries(POLICIES),
        perturbations=_entries(PERTURBATIONS),
        classifiers=_entries(CLASSIFIERS),
        skip_tuning=(_entry(SkipTuning, "skip_tuning"),),
        particles=_entries((FeynmanKac,)),
        negtome=(_entry(NegToMe, "negtome"),),
        defaults=_defaults(),
        models=models,
    )


@cache
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
