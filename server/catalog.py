"""What this installation offers: samplers, spacings and guidance, described by themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from guidance import CLASSIFIERS, PERTURBATIONS, POLICIES, RULES
from samplers import SAMPLERS, SPACINGS
from server.choice import name_of

__all__ = ["Catalog", "Entry", "ModelEntry", "catalog"]


class Entry(BaseModel):
    """One sampler, spacing, rule, policy, perturbation or classifier's term."""

    model_config = ConfigDict(frozen=True)

    name: str
    summary: str = Field(description="One line.")
    source: str = Field(description="Paper and equation.")
    parameters: dict[str, Any] = Field(description="JSON schema of its fields.")
    defaults: dict[str, Any] = Field(description="The object that the bare name stands for.")
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
        description="Guidance that `dpm_solver_v3` has statistics of this model for."
    )
    classifier: dict[str, tuple[str, ...]] = Field(
        description="Classes that `guidance.classifier.target` may name, by attribute."
    )


class Catalog(BaseModel):
    """Everything that a request may name."""

    model_config = ConfigDict(frozen=True)

    samplers: tuple[Entry, ...]
    spacings: tuple[Entry, ...]
    rules: tuple[Entry, ...]
    policies: tuple[Entry, ...]
    perturbations: tuple[Entry, ...]
    classifiers: tuple[Entry, ...] = Field(description="Terms that a model's classifier adds.")
    models: tuple[ModelEntry, ...] = Field(description="Empty until they are loaded.")


def catalog(models: tuple[ModelEntry, ...] = ()) -> Catalog:
    """The catalog of what is installed, with the models that are hosted."""
    return Catalog(
        samplers=tuple(_entry(member) for member in SAMPLERS),
        spacings=tuple(_entry(member) for member in SPACINGS),
        rules=tuple(_entry(member) for member in RULES),
        policies=tuple(_entry(member) for member in POLICIES),
        perturbations=tuple(_entry(member) for member in PERTURBATIONS),
        classifiers=tuple(_entry(member) for member in CLASSIFIERS),
        models=models,
    )


@cache
def _entry(member: type[BaseModel]) -> Entry:
    defaults = member()
    properties = {
        name: value
        for name in _declared(member)
        if isinstance(value := getattr(defaults, name), str | int | float | bool)
    }
    summary, source = (str(properties.pop(name)) for name in ("summary", "source"))
    return Entry(
        name=name_of(member),
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
