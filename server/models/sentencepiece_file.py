"""Reads SentencePiece files, for T5 tokenizers whose folder has no ``tokenizer.json``.

Such a file is a protocol buffers message, of which three fields are needed; the library is not.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from server.errors import ModelMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["t5_tokenizer"]

PIECE, TRAINER, NORMALIZER = 1, 2, 3
"""Fields of the top-level message."""

TEXT, SCORE = 1, 2
"""Fields of a piece."""

MODEL_TYPE, UNIGRAM = 3, 1
"""Field of the trainer's settings with the model type, and its value for T5; it is also the
default."""

CHARACTERS = 2
"""Field of the normalizer with the table of character replacements."""

VARINT, EIGHT_BYTES, COUNTED, FOUR_BYTES = 0, 1, 2, 5
"""Wire types of fields."""

EXTRA: Final = 100
"""Number of sentinel tokens after the pieces, which T5's tokenizer adds."""


def t5_tokenizer(folder: Path, name: str, kind: Any) -> Any:
    """Build a T5 tokenizer from a SentencePiece file.

    Args:
        folder: model folder.
        name: name of the file in it.
        kind: ``T5Tokenizer``.

    Raises:
        ModelMismatch: the file is not a SentencePiece unigram model.
    """
    vocabulary: list[tuple[str, float]] = []
    characters = b""
    try:
        for field, value in _fields((folder / name).read_bytes()):
            if field == PIECE:
                own = dict(_fields(value))
                [score] = struct.unpack("<f", own[SCORE]) if SCORE in own else [0.0]
                vocabulary.append((own[TEXT].decode(), score))
            elif field == TRAINER and dict(_fields(value)).get(MODEL_TYPE, UNIGRAM) != UNIGRAM:
                raise ValueError
            elif field == NORMALIZER:
                characters = dict(_fields(value)).get(CHARACTERS, b"")
        if not vocabulary:
            raise ValueError
        vocabulary += [(f"<extra_id_{place}>", 0.0) for place in reversed(range(EXTRA))]
        return kind(vocab=vocabulary, _spm_precompiled_charsmap=characters or None, extra_ids=EXTRA)
    except Exception as error:
        # The tokenizer's library raises various exceptions for pieces that form no vocabulary.
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} is not a SentencePiece model of T5's kind."
        ) from error


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field; a value is an integer or bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, written = tag >> 3, tag & 7
        if written == VARINT:
            value, at = _varint(message, at)
            yield field, value
            continue
        if written == COUNTED:
            size, at = _varint(message, at)
        else:
            size = {EIGHT_BYTES: 8, FOUR_BYTES: 4}[written]
        if at + size > len(message):
            raise ValueError
        yield field, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Decode a number of 7 bits per byte, lowest first; also returns the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
