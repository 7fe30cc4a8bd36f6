"""Textual inversion embeddings that the texts of a request name as words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import EmbeddingMismatch, InvalidRequest
from server.requests.checks.classifier import alternatives_of
from server.requests.prompt_editing import prompts_of, versions_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from server.models.embeddings.embedding import Embedding
    from server.models.hosted import HostedModel
    from server.requests.schema import ResolvedRequest

__all__ = ["check_embeddings", "load_embeddings", "texts_of", "unfit_embeddings"]


def texts_of(resolved: ResolvedRequest, model: HostedModel) -> Iterator[tuple[str, str]]:
    """Yield every text that the model may encode for a request, with the field that it comes from.

    Args:
        resolved: request.
        model: model that will serve it.

    Raises:
        InvalidRequest: the prompt does not mention a classifier's target.
    """
    for field, prompt in prompts_of(resolved):
        for text in dict.fromkeys(versions_of(resolved, prompt)):
            yield field, text
    for text in alternatives_of(resolved, model):
        yield "guidance.classifier", text


def check_embeddings(resolved: ResolvedRequest, model: HostedModel) -> None:
    """Refuse a request whose embeddings can never be in memory at once.

    Raises:
        InvalidRequest: they need more memory than the limit for all embeddings.
    """
    texts = [text for _, text in texts_of(resolved, model)]
    try:
        model.embeddings.check_together(model.embeddings.named_in(*texts))
    except EmbeddingMismatch as refusal:
        raise InvalidRequest("prompt", f"prompt: {refusal.message}") from None


def unfit_embeddings(texts: Sequence[str], model: HostedModel) -> tuple[str, ...]:
    """Return one sentence for each word that names an embedding but is read as plain text."""
    return tuple(
        f"{name!r} is read as plain text: {reason}"
        for name, reason in model.embeddings.unfit_in(*texts).items()
    )


def load_embeddings(texts: Sequence[str], model: HostedModel) -> tuple[Embedding, ...]:
    """Load the embeddings that texts name.

    Args:
        texts: texts of a checked request.
        model: model that will serve it.

    Raises:
        InvalidRequest: a file was changed or removed after the check, or does not hold numbers.
        Overloaded: the embeddings of running requests leave no room.
    """
    try:
        return tuple(model.embeddings.load(one.name) for one in model.embeddings.named_in(*texts))
    except EmbeddingMismatch as refusal:
        raise InvalidRequest("prompt", f"prompt: {refusal.message}") from None
