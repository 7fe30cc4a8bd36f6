"""Checks of a request's numbers, size and texts against the operator's limits and the model."""

from __future__ import annotations

from typing import Final

from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest
from server.models.emphasis import MAX_CHUNKS, EmphasizedPrompt
from server.models.hosted import HostedModel, ModelFacts
from server.requests.embeddings import texts_of
from server.requests.schema import GenerateRequest, ResolvedRequest, check_printable
from server.requests.start_noise import MAX_SEED
from server.settings import Limits

__all__ = ["check_count", "check_limits", "check_size", "check_tokens", "runs_of"]

SYNTAX_FIELDS: Final = ("prompt", "negative_prompt", "guidance")
"""Fields whose texts `prompt_syntax` applies to."""


def check_count(request: GenerateRequest, limits: Limits) -> None:
    """Refuse more images than one request may ask for, before room for them is reserved.

    Raises:
        InvalidRequest: `n` exceeds the limit.
    """
    _at_most("n", request.n, limits.images)
    if runs_of(request) * request.n > limits.images:
        raise InvalidRequest(
            "n",
            f"n is {request.n}; with hires each image is drawn twice, so at most "
            f"{limits.images // 2} are allowed.",
        )


def runs_of(request: GenerateRequest) -> int:
    """Return how often the engine draws each image of a request."""
    return 1 if request.hires is None else 2


def check_limits(request: ResolvedRequest, limits: Limits) -> None:
    """Refuse what this server's operator does not allow.

    Raises:
        InvalidRequest: a field exceeds its limit, or a text of guidance has unprintable characters.
    """
    _at_most("steps", request.steps, limits.steps)
    _at_most("n", request.n, limits.images)
    own = [("guidance", one.prompt) for one in request.guidance.branches if one.told == "own"]
    for field, text in own:
        try:
            check_printable(text)
        except PydanticCustomError as error:
            raise InvalidRequest(field, f"A prompt of {field} {error.message()}.") from None
    for field, text in (
        ("prompt", request.prompt),
        ("negative_prompt", request.negative_prompt or ""),
        *own,
    ):
        size = len(text.encode())
        if size > limits.prompt_bytes:
            raise InvalidRequest(
                field, f"{field} has {size} bytes; at most {limits.prompt_bytes} are allowed."
            )
    variation, field, seed = request.variation, "seed", request.seed
    if variation is not None and variation.seed is not None:
        field, seed = "variation.seed", variation.seed
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidRequest(
            field, f"{field} is {seed}; {field} + n - 1 must be at most {MAX_SEED}."
        )


def check_size(resolved: ResolvedRequest, facts: ModelFacts, limits: Limits) -> None:
    """Refuse a size that the model cannot draw, or that is too large for this server.

    Raises:
        InvalidRequest: a side is not a multiple of what the model needs or is longer than it has
            positions for, or there are too many pixels.
    """
    _check_size("", resolved.width, resolved.height, facts, limits)
    if (noise := resolved.noise_size) is not None:
        _check_size("noise_size.", noise.width, noise.height, facts, limits)


def check_tokens(resolved: ResolvedRequest, model: HostedModel) -> None:
    """Refuse a text that is longer than the model's prompts may be.

    Raises:
        InvalidRequest: a prompt has too many tokens.
    """
    max_tokens = model.facts.max_tokens
    for field, text in texts_of(resolved, model):
        if resolved.prompt_syntax is not None and field in SYNTAX_FIELDS:
            _check_tokens(field, EmphasizedPrompt(text), model, MAX_CHUNKS * max_tokens)
        else:
            _check_tokens(field, text, model, max_tokens)


def _check_size(within: str, width: int, height: int, facts: ModelFacts, limits: Limits) -> None:
    for name, side in (("width", width), ("height", height)):
        field = f"{within}{name}"
        if side % facts.size_multiple:
            raise InvalidRequest(
                field,
                f"{field} is {side}; model {facts.name!r} needs a multiple of "
                f"{facts.size_multiple}.",
            )
        if facts.longest_side is not None and side > facts.longest_side:
            raise InvalidRequest(
                field,
                f"{field} is {side}; model {facts.name!r} draws at most {facts.longest_side}.",
            )
    if width * height > limits.pixels:
        raise InvalidRequest(
            f"{within}width",
            f"{within}width x height is {width} x {height}; at most {limits.pixels} pixels are "
            "allowed.",
        )


def _check_tokens(field: str, text: str, model: HostedModel, max_tokens: int) -> None:
    tokens = model.count_tokens(text)
    if tokens > max_tokens:
        raise InvalidRequest(
            field,
            f"{field} has {tokens} tokens; model {model.facts.name!r} takes at most {max_tokens}.",
        )


def _at_most(field: str, value: int, max_tokens: int) -> None:
    if value > max_tokens:
        raise InvalidRequest(field, f"{field} is {value}; at most {max_tokens} is allowed.")
