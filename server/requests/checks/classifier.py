"""Checks that a classifier's term is compatible with the model's classifier and the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guidance import ClassifierGuidance, ReferenceGuidance
from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.requests.choice import listed
from server.requests.schema import ResolvedRequest

if TYPE_CHECKING:
    # Only for type checkers: it needs torch, and this module does not.
    from server.models.classifier import LatentClassifier

__all__ = ["alternatives_of", "check_classifier", "classifier_of"]

FIELD = "guidance.classifier"


def check_classifier(resolved: ResolvedRequest, model: HostedModel) -> None:
    """Refuse a target that the model's classifier does not know, or the prompt does not mention.

    Raises:
        InvalidRequest: there is no classifier, or it lacks an attribute or a class.
    """
    term = resolved.guidance.classifier
    if term is None:
        return
    heads = classifier_of(term, model).heads
    if not term.aims:
        raise InvalidRequest(
            f"{FIELD}.target",
            f"{FIELD}.target is empty; {term.name!r} needs a class for at least one of: "
            f"{listed([*heads])}.",
        )
    for attribute, name in term.aims.items():
        if attribute not in heads:
            raise InvalidRequest(
                f"{FIELD}.target",
                f"{FIELD}.target names {attribute[:60]!r}; the classifier of model "
                f"{model.facts.name!r} has: {listed([*heads])}.",
            )
        if name not in heads[attribute]:
            raise InvalidRequest(
                f"{FIELD}.target.{attribute}",
                f"{FIELD}.target.{attribute} is {name[:60]!r}; the classifier of model "
                f"{model.facts.name!r} has: {listed(heads[attribute])}.",
            )
    alternatives_of(resolved, model)


def alternatives_of(resolved: ResolvedRequest, model: HostedModel) -> tuple[str, ...]:
    """Return the prompts among which the classifier chooses a reference; empty if it needs none.

    Raises:
        InvalidRequest: the prompt does not mention the target.
    """
    term = resolved.guidance.classifier
    if not isinstance(term, ReferenceGuidance):
        return ()
    try:
        return term.alternatives(resolved.prompt, classifier_of(term, model).heads)
    except ValueError as refusal:
        raise InvalidRequest(f"{FIELD}.target", str(refusal)) from None


def classifier_of(term: ClassifierGuidance, model: HostedModel) -> LatentClassifier:
    """Return the classifier that a term needs.

    Raises:
        InvalidRequest: the model has none.
    """
    if model.classifier is None:
        raise InvalidRequest(
            FIELD,
            f"{FIELD} is {term.name!r}, but model {model.facts.name!r} has no classifier: "
            f"{model.classifier_lacks}; leave {FIELD} out.",
        )
    return model.classifier
