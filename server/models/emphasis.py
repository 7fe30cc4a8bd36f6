"""Prompts in the syntax of AUTOMATIC1111: weighted words, and more tokens than the encoder takes.

As its ``prompt_parser.parse_prompt_attention``, ``TextConditionalModel.tokenize_line`` and
``EmphasisOriginal`` do it (stable-diffusion-webui 1.10). Departures: ``BREAK`` breaks inside of
brackets too, weights are bounded by ``STRONGEST``, a mean of about zero is not restored, and each
prompt is rescaled by itself, where there it is with the others of its batch. Texts
that change along a run are ``server.models.prompt_editing``.
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
    "MOST_CHUNKS",
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

MOST_CHUNKS: Final = 4
"""Of one prompt. Prompts of one image are repeated to one length, of at most 12 chunks."""

SURELY_ONE_CHUNK: Final = 75
"""Bytes of a text; CLIP's tokens have at least one each, and its chunks 75 tokens."""

STRONGEST: Final = 16.0

ROUND: Final = 1.1
"""Weight of what stands in round brackets; square ones divide by it."""

NO_MEAN: Final = 1e-4
"""Share of their root mean square below which hidden states have no mean to restore."""

BACKTRACK: Final = 20
"""Tokens since the last comma that go to the next chunk when one is full."""

_CLOSING: Final = {")": ("(", ROUND), "]": ("[", 1 / ROUND)}
"""The bracket that another one closes, and the factor on what is inside."""

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
number after a last colon, which there is a weight of the prompt even if it is the only one."""


class EmphasizedPrompt(str):
    """A prompt whose brackets are weights; no model that does not know it reads them.

    It is equal to no plain text, so that both are encoded.
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
    """A part of a prompt; without a weight it begins a new chunk, and has no text."""

    text: str
    weight: float | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """As many tokens as the encoder takes, or fewer, each with its weight; without markers."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def is_weighted(text: str) -> bool:
    """Whether a text says anything in this syntax."""
    return _SYNTAX.search(text) is not None


def escaped(text: str) -> str:
    """A plain text as it is written in this syntax, so that it says the same there."""
    return _READ.sub(r"\\\g<0>", text)


def is_long(text: str) -> bool:
    """Whether a text may have more tokens than one chunk."""
    return len(text.encode()) > SURELY_ONE_CHUNK


def plain_text(prompt: str | None) -> str:
    """What is encoded in the batch of plain prompts, which keeps its size, for any prompt."""
    return "" if prompt is None or isinstance(prompt, EmphasizedPrompt) else prompt


def segments_of(text: str) -> list[Segment]:
    """The parts of a prompt with their weights; neighbours of one weight are one."""
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
    # Thousands of brackets around thousands of parts, as nobody but an attacker writes them.
    with np.errstate(over="ignore", invalid="ignore"):
        for inside, factor in closed:
            weights[inside] *= factor
    return _merged(parts, weights.tolist())


def _broken(text: str) -> Iterator[str | None]:
    """What is between the breaks, each of which is None and takes the blanks around it."""
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
    """The tokens of a prompt in chunks of at most `room`, which break after a comma if they can.

    Args:
        segments: of the prompt.
        tokenize: tokens of a text, without markers, in pieces that stay in one chunk: each token
            by itself, or all vectors of an embedding. None has more than `room`.
        comma: token of a comma that ends a word.
        room: tokens that the encoder takes beside its markers.

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
    """Hidden states times their weights, with the mean of each chunk as it was.

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
    # Without weights, bit for bit what the encoder puts out.
    plain = (weights == 1).all(1)[:, None, None].to(hidden.device)
    return torch.where(plain, hidden, (weighed * ratio).to(hidden.dtype))
