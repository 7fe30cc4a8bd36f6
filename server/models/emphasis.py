"""Prompts in the syntax of AUTOMATIC1111: weighted words, and more tokens than the encoder takes.

The behavior is that of its ``prompt_parser.parse_prompt_attention``,
``TextConditionalModel.tokenize_line`` and ``EmphasisOriginal`` (stable-diffusion-webui 1.10).
Departures: ``BREAK`` also breaks inside brackets, weights are bounded by ``STRONGEST``, a mean of
about zero is not restored, and each prompt is rescaled by itself, where AUTOMATIC1111 rescales it
together with the others of its batch. Texts that change during a run are handled in
``server.models.prompt_editing``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = [
    "MAX_CHUNKS",
    "Chunk",
    "EmphasizedPrompt",
    "Segment",
    "chunks_of",
    "escaped",
    "is_long",
    "is_weighted",
    "plain_text",
    "rescaled",
    "segments_of",
]

MAX_CHUNKS: Final = 4
"""Maximum number of chunks of a prompt. Prompts of one image are repeated to a common length, of at
most 12 chunks."""

SURELY_ONE_CHUNK: Final = 75
"""Bytes of a text that surely fits into one chunk: CLIP's tokens have at least one byte each, and a
chunk has 75 tokens."""

STRONGEST: Final = 16.0

ROUND: Final = 1.1
"""Weight of text in round brackets; square brackets divide by it."""

NO_MEAN: Final = 1e-4
"""Ratio of mean to root mean square below which hidden states have no mean to restore."""

BACKTRACK: Final = 20
"""Maximum number of tokens since the last comma that move to the next chunk when one is full."""

_CLOSING: Final = {")": ("(", ROUND), "]": ("[", 1 / ROUND)}
"""The opening bracket for a closing one, and the factor on the text inside."""

_PIECE: Final = re.compile(
    r"\\.|\(|\[|:\s*+([+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)|\)|\]|[^\\()\[\]:]++|:|\\", re.DOTALL
)
_BREAK: Final = re.compile(r"\bBREAK\b")
_SYNTAX: Final = re.compile(r"[\\()\[\]]|\bBREAK\b")
_READ: Final = re.compile(
    r"[\\()\[\]]|(?<=\bB)(?=REAK\b)|(?<=\bA)(?=ND\b)|(?<=<)(?=\w+:[^<>]+>)"
    r"|(?<=:)(?=\s*+[-+]?(?:\d+\.?|\d*\.\d+)\s*\Z)"
)
"""Where AUTOMATIC1111 reads more than plain text: weights, chunks, joined prompts, tags, and a
number after a final colon, which is a weight of the prompt there even if it is the only one."""


class EmphasizedPrompt(str):
    """A prompt whose brackets are weights, for models that support them.

    It compares unequal to any plain text, so that both are encoded.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EmphasizedPrompt) and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((EmphasizedPrompt, str(self)))


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt. A segment without a weight starts a new chunk and has no text."""

    text: str
    weight: float | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """At most as many tokens as the encoder takes, each with its weight; excluding markers."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def is_weighted(text: str) -> bool:
    """Whether a text uses this syntax."""
    return _SYNTAX.search(text) is not None


def escaped(text: str) -> str:
    """Escape a plain text, so that it has the same meaning in this syntax."""
    return _READ.sub(r"\\\g<0>", text)


def is_long(text: str) -> bool:
    """Whether a text may have more tokens than fit into one chunk."""
    return len(text.encode()) > SURELY_ONE_CHUNK


def plain_text(prompt: str | None) -> str:
    """The text for the batch of plain prompts, whose size is fixed; empty for a weighted prompt."""
    return "" if prompt is None or isinstance(prompt, EmphasizedPrompt) else prompt


def segments_of(text: str) -> list[Segment]:
    """Split a prompt into segments with their weights, merging neighbors of equal weight."""
    parts: list[str | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    closed: list[tuple[slice, float]] = []

    def weigh(start: int, factor: float) -> None:
        closed.append((slice(start, len(parts)), factor))

    for match in _PIECE.finditer(text):
        piece, weight = match[0], match[1]
        if piece.startswith("\\"):
            parts.append(piece[1:])
        elif piece in opened:
            opened[piece].append(len(parts))
        elif weight is not None and opened["("]:
            weigh(opened["("].pop(), float(weight))
        elif piece in _CLOSING and opened[_CLOSING[piece][0]]:
            opening, factor = _CLOSING[piece]
            weigh(opened[opening].pop(), factor)
        else:
            parts += _broken(piece)
    for opening, factor in _CLOSING.values():
        for start in opened[opening]:
            weigh(start, factor)
    weights = np.ones(len(parts))
    # Thousands of brackets around thousands of parts may overflow; only an attacker writes them.
    with np.errstate(over="ignore", invalid="ignore"):
        for inside, factor in closed:
            weights[inside] *= factor
    return _merged(parts, weights.tolist())


def _broken(text: str) -> Iterator[str | None]:
    """The texts between breaks, stripped of whitespace there, and None for each break."""
    first, *others = _BREAK.split(text)
    for part in others:
        yield first.rstrip()
        yield None
        first = part.lstrip()
    yield first


def _merged(parts: Sequence[str | None], weights: Sequence[float]) -> list[Segment]:
    merged: list[Segment] = []
    for text, factor in zip(parts, weights, strict=True):
        if text is None:
            merged.append(Segment("", None))
            continue
        weight = max(-STRONGEST, min(STRONGEST, factor))
        if merged and merged[-1].weight == weight:
            merged[-1] = Segment(merged[-1].text + text, weight)
        else:
            merged.append(Segment(text, weight))
    return merged


def chunks_of(
    segments: Sequence[Segment],
    tokenize: Callable[[str], Sequence[tuple[int, ...]]],
    *,
    comma: int,
    room: int,
) -> list[Chunk]:
    """Split the tokens of a prompt into chunks of at most `room`, after a comma where possible.

    Args:
        segments: segments of the prompt.
        tokenize: tokenizes a text without markers, into pieces that stay in one chunk: each token
            by itself, or all vectors of an embedding. No piece has more than `room` tokens.
        comma: token of a comma at the end of a word.
        room: number of tokens that the encoder takes, excluding markers.

    Returns:
        At least one chunk, which may be empty.
    """
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    after_comma = 0

    def close(kept: int) -> None:
        nonlocal after_comma
        chunks.append(Chunk(tuple(tokens[:kept]), tuple(weights[:kept])))
        del tokens[:kept], weights[:kept]
        after_comma = 0

    for piece, weight in _weighted_pieces(segments, tokenize):
        if piece is None:
            close(len(tokens))
            continue
        if len(tokens) == room:
            near = piece != (comma,) and after_comma and room - after_comma < BACKTRACK
            close(after_comma if near else room)
        if len(tokens) + len(piece) > room:
            close(len(tokens))
        tokens += piece
        weights += [weight] * len(piece)
        if piece == (comma,):
            after_comma = len(tokens)
    if tokens or not chunks:
        close(len(tokens))
    return chunks


def _weighted_pieces(
    segments: Sequence[Segment], tokenize: Callable[[str], Sequence[tuple[int, ...]]]
) -> Iterator[tuple[tuple[int, ...] | None, float]]:
    """Each piece with its weight; None where a new chunk begins."""
    for segment in segments:
        if segment.weight is None:
            yield None, 1.0
            continue
        for piece in tokenize(segment.text):
            yield piece, segment.weight


def rescaled(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply hidden states by their weights, and restore the mean of each chunk.

    Args:
        hidden: ``[chunks, tokens, features]``.
        weights: ``[chunks, tokens]``.
    """
    exact = hidden.float()
    weighed = exact * weights[..., None].to(exact)
    before = exact.mean((1, 2), keepdim=True)
    after = weighed.mean((1, 2), keepdim=True)
    size = exact.square().mean((1, 2), keepdim=True).sqrt()
    lost = torch.minimum(before.abs(), after.abs()) < NO_MEAN * size
    ratio = torch.where(lost, 1.0, before / after)
    # Where all weights are 1, the encoder's output is returned bit for bit.
    plain = (weights == 1).all(1)[:, None, None].to(hidden.device)
    return torch.where(plain, hidden, (weighed * ratio).to(hidden.dtype))
