"""The catalog: what this installation offers, and the defaults of requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from guidance import RULES, STEP_CACHES
from guidance.parts import PARTS, Part
from samplers import SAMPLERS, SPACINGS
from server.requests.choice import name_of
from server.requests.defaults import guidance_for, sampler_for, spacing_for, steps_for
from server.requests.hires import Upscaler
from server.requests.schema import GenerateRequest, MaskContent
from weft_plugins import origin_of

if TYPE_CHECKING:
    from server.models.defaults import ModelDefaults
    from server.models.hosted import HostedModel

__all__ = [
    "AdapterEntry",
    "Catalog",
    "Choice",
    "ControlEntry",
    "Defaults",
    "Entry",
    "ImagePromptEntry",
    "ModelEntry",
    "adapter_entries",
    "catalog",
    "control_entries",
    "defaults_of",
    "embedding_entries",
    "image_prompt_entries",
]


class Entry(BaseModel):
    """One item that a request may choose: a sampler, a spacing, a rule, a policy, ..."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(
        description="A bare name in a request selects these `defaults`, if they have a `name`; "
        "otherwise this is the request's field."
    )
    summary: str = Field(description="One-line description.")
    source: str = Field(description="Paper and equation.")
    plugin: str | None = Field(
        description="The installed package or the file that it is from; null if it is Weft's own."
    )
    parameters: dict[str, Any] = Field(description="JSON schema of its fields.")
    defaults: dict[str, Any] = Field(
        description="The complete object; fields that a request leaves out take these values."
    )
    properties: dict[str, str | int | float | bool] = Field(
        description="Its properties at these defaults: order, evaluations, ..."
    )


class Defaults(BaseModel):
    """Defaults of fields that a request leaves out."""

    model_config = ConfigDict(frozen=True)

    n: int
    steps: int = Field(description="Number of steps, unless the spacing prescribes one.")
    sampler: dict[str, Any]
    spacing: dict[str, Any] | None = Field(
        description="Spacing of this sampler; null stands for the sampler's own. A request that "
        "names another sampler gets that sampler's own spacing."
    )
    guidance: dict[str, Any]
    convention: str | None = Field(
        description="The convention that a distilled model is sampled by, as docs/families.md "
        "lists them; null for other models."
    )
    guidance_by_sampler: dict[str, dict[str, Any]] = Field(
        description="Guidance of samplers that have another default, by their names."
    )


class AdapterEntry(BaseModel):
    """One LoRA adapter of a hosted model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Its name in a request.")
    rank: int = Field(description="The largest rank of its changes.")
    changes: tuple[str, ...] = Field(
        description="The networks that it changes, by their names in a model folder."
    )
    defaults: Defaults | None = Field(
        description="Defaults of requests with this adapter, if its file says what it was made "
        "for; null if they are the model's."
    )


class EmbeddingEntry(BaseModel):
    """One textual inversion embedding of a hosted model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="The word that stands for it in prompts.")
    vectors: int = Field(description="Number of tokens that it takes up in a prompt.")
    width: int = Field(description="Length of a vector, for all text encoders together.")


class ControlEntry(BaseModel):
    """One ControlNet of a hosted model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Its name in a request.")


class ImagePromptEntry(BaseModel):
    """One IP-Adapter of a hosted model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Its name in a request.")
    tokens: int = Field(description="Number of tokens that it makes from a picture.")


class ModelEntry(BaseModel):
    """One hosted model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Its name in a request.")
    revision: str = Field(description="Hash of the model's weights.")
    width: int = Field(description="Default width in pixels.")
    height: int = Field(description="Default height in pixels.")
    size_multiple: int = Field(description="Width and height are multiples of this.")
    longest_side: int | None = Field(
        description="Maximum width and height in pixels; null if only the server's limit applies."
    )
    max_tokens: int = Field(description="Maximum length of a prompt, in tokens.")
    vae: str | None = Field(
        description="Name of the autoencoder that replaces the model's own; null for its own."
    )
    tiny_vae: str | None = Field(
        description="Name of the tiny autoencoder of requests with the `autoencoder` `tiny`; null "
        "if there is none."
    )
    denoiser: str | None = Field(
        description="Name of the file of the U-Net or transformer that replaces the model's own; "
        "null for its own."
    )
    clip_skips: tuple[int, ...] = Field(
        description="Choices of `clip_skip`, the model's own first; empty if it does not support "
        "it."
    )
    prompt_syntaxes: tuple[str, ...] = Field(
        description="Choices of `prompt_syntax`; empty if it reads all prompts as plain text."
    )
    statistics: tuple[str, ...] = Field(
        description="Guidance for which this model has statistics; samplers whose `properties` say "
        "so use them."
    )
    classifier: dict[str, tuple[str, ...]] = Field(
        description="The classes that `guidance.classifier.target` may name, for each attribute."
    )
    adapters: tuple[AdapterEntry, ...] = Field(
        description="The LoRA adapters that fit this model; choices of `adapters`."
    )
    controls: tuple[ControlEntry, ...] = Field(
        description="The ControlNets that fit this model; choices of `controls`."
    )
    embeddings: tuple[EmbeddingEntry, ...] = Field(
        description="The embeddings that prompts to this model may name."
    )
    unfit_embeddings: dict[str, str] = Field(
        description="Why the server's other embeddings are plain text to this model, by name."
    )
    image_prompts: tuple[ImagePromptEntry, ...] = Field(
        description="The IP-Adapters that fit this model; choices of `image_prompts`."
    )
    reference_images: int = Field(
        description="Maximum number of `reference_images`; 0 if this model does not read them."
    )
    defaults: Defaults = Field(description="Defaults of requests to this model.")


class Choice(BaseModel):
    """A choice that a form offers: its list in the catalog and its field in a request."""

    model_config = ConfigDict(frozen=True)

    entries: str = Field(description="Name of the list in this catalog.")
    field: str = Field(description="Field of a request that takes the choice, as a dotted path.")
    title: str = Field(description="Its label.")
    description: str = Field(description="One sentence about it.")
    most: int = Field(description="Maximum number of items; above 1 the field is a list.")
    blank: str | None = Field(description="Label for choosing none; null if one is always chosen.")


class _Offered(BaseModel):
    """The catalog without the lists for parts of `guidance`."""

    model_config = ConfigDict(frozen=True)

    samplers: tuple[Entry, ...] = Field(description="Choices of `sampler`.")
    spacings: tuple[Entry, ...] = Field(description="Choices of `spacing`.")
    rules: tuple[Entry, ...] = Field(description="Choices of `guidance`.")
    caches: tuple[Entry, ...] = Field(description="Choices of `cache`.")
    upscalers: tuple[Upscaler, ...] = Field(description="Choices of `hires.upscaler`.")
    mask_contents: tuple[MaskContent, ...] = Field(description="Choices of `mask_content`.")
    choices: tuple[Choice, ...] = Field(description="The choices that a form offers, in order.")
    defaults: Defaults = Field(description="Defaults for models that have none of their own.")
    models: tuple[ModelEntry, ...] = Field(
        description="The hosted models; empty until they are loaded."
    )


if TYPE_CHECKING:
    Catalog = _Offered
else:
    Catalog = create_model(
        "Catalog",
        __base__=_Offered,
        __doc__="Everything that a request may choose from.",
        **{
            part.plural: (
                tuple[Entry, ...],
                Field(description=f"Choices of `guidance.{part.field}`. {part.description}"),
            )
            for part in PARTS
        },
    )


def catalog(models: tuple[ModelEntry, ...] = ()) -> Catalog:
    """Return the catalog of this installation and the hosted models."""
    parts = {part.plural: _entries_of(part) for part in PARTS}
    return Catalog(
        samplers=_entries(SAMPLERS),
        spacings=_entries(SPACINGS),
        rules=_entries(RULES),
        caches=_entries(STEP_CACHES),
        upscalers=get_args(Upscaler),
        mask_contents=get_args(MaskContent),
        choices=CHOICES,
        defaults=defaults_of(None),
        models=models,
        **parts,
    )


def adapter_entries(model: HostedModel) -> tuple[AdapterEntry, ...]:
    """Return the catalog's entries for a model's adapters."""
    return tuple(
        AdapterEntry(
            name=file.name,
            rank=file.rank,
            changes=file.networks,
            defaults=None if file.defaults is None else defaults_of(file.defaults),
        )
        for file in model.adapters.available()
    )


def embedding_entries(model: HostedModel) -> tuple[EmbeddingEntry, ...]:
    """Return the catalog's entries for a model's embeddings."""
    return tuple(
        EmbeddingEntry(name=one.name, vectors=one.vectors, width=sum(one.widths.values()))
        for one in model.embeddings.available()
    )


def control_entries(model: HostedModel) -> tuple[ControlEntry, ...]:
    """Return the catalog's entries for a model's ControlNets."""
    return tuple(ControlEntry(name=one.name) for one in model.controls.available())


def image_prompt_entries(model: HostedModel) -> tuple[ImagePromptEntry, ...]:
    """Return the catalog's entries for a model's IP-Adapters."""
    found = model.image_prompts.available()
    return tuple(ImagePromptEntry(name=one.name, tokens=one.tokens) for one in found)


@cache
def defaults_of(own: ModelDefaults | None) -> Defaults:
    """Return the values of fields that requests leave out.

    Args:
        own: defaults of the model; None if it has none.
    """
    sampler = sampler_for(own)
    plain = guidance_for(own, sampler).model_dump(mode="json")
    samplers = [member.model_validate({}) for member in SAMPLERS]
    guidance = {one.name: guidance_for(own, one).model_dump(mode="json") for one in samplers}
    spacing = spacing_for(own, sampler)
    return Defaults(
        n=GenerateRequest.model_fields["n"].default,
        steps=steps_for(own, spacing),
        sampler=sampler.model_dump(mode="json"),
        spacing=None if own is None else spacing.model_dump(mode="json"),
        guidance=plain,
        convention=None if own is None else own.convention,
        guidance_by_sampler={name: other for name, other in guidance.items() if other != plain},
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
    Choice(
        entries="caches",
        field="cache",
        title="Step cache",
        description="Skips evaluations of the network that would change little.",
        most=1,
        blank="off",
    ),
)


def _entries_of(part: Part) -> tuple[Entry, ...]:
    if part.named:
        return _entries(part.kinds)
    return tuple(_entry(kind, part.field) for kind in part.kinds)


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
        plugin=origin_of(member),
        parameters=member.model_json_schema(),
        defaults=defaults.model_dump(mode="json"),
        properties=properties,
    )


def _declared(member: type[BaseModel]) -> list[str]:
    """Return the names of a class's attributes and properties, those of its parents first."""
    names: dict[str, None] = {}
    for kind in reversed(member.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        constants = kind.__class_vars__
        computed = {name for name, value in vars(kind).items() if isinstance(value, property)}
        names |= dict.fromkeys(sorted(n for n in constants | computed if not n.startswith("_")))
    return list(names)
