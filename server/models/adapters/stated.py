"""Sampling settings that an adapter's file states for models that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from server.errors import AdapterMismatch
from server.models.conventions import CONVENTIONS, defaults_by, numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from server.models.defaults import ModelDefaults

__all__ = ["ALLOWED", "stated_defaults"]

CONVENTION: Final = "weft.convention"
"""Entry of a safetensors file's metadata with the name of a convention."""

STEPS: Final = "weft.steps"
"""Number of steps that the adapter is for, where each number has its own weights."""

ALLOWED: Final = tuple(
    name
    for name, one in CONVENTIONS.items()
    if not (one.flow or one.policy.embeds or one.one_step_prediction or one.rule.combines)
)
"""Conventions of distilled models that do not change how the base model's output is interpreted."""


def stated_defaults(name: str, metadata: Mapping[str, str]) -> ModelDefaults | None:
    """The settings that an adapter was distilled for; None where its file states none.

    Args:
        name: name of the adapter.
        metadata: metadata of its file.

    Raises:
        AdapterMismatch: an unknown convention or number of steps; the message continues a sentence
            that begins with the adapter's name.
    """
    said, steps = metadata.get(CONVENTION), metadata.get(STEPS)
    if said is None:
        return None
    if said not in ALLOWED:
        raise AdapterMismatch(
            f"has the {CONVENTION} {said[:40]!r}; allowed are {', '.join(ALLOWED)}"
        )
    convention = CONVENTIONS[said]
    if steps is None and convention.weights_of_counts:
        raise AdapterMismatch(
            f"has the {CONVENTION} {said!r}, whose weights are for one number of steps each; add "
            f"{STEPS}, which is {numbers(convention.counts)}"
        )
    if steps is not None and steps not in map(str, convention.counts):
        raise AdapterMismatch(
            f"has the {STEPS} {steps[:40]!r}; with the {CONVENTION} {said!r} it is "
            f"{numbers(convention.counts) if convention.counts else 'left out'}"
        )
    reason = f"adapter {name!r} is made for it"
    return defaults_by(said, reason, steps=None if steps is None else int(steps))
