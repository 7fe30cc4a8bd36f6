"""T5's tokenizer read from a SentencePiece file equals that of its vocabulary."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from transformers import GemmaTokenizer, T5Tokenizer

from server.errors import ModelMismatch
from server.models.parts import load_tokenizer

PIECES = [
    ("<pad>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<unk>", 0.0, 2),
    ("\N{LOWER ONE EIGHTH BLOCK}a", -1.5, 1),
    ("\N{LOWER ONE EIGHTH BLOCK}star", -2.0, 1),
    ("\N{LOWER ONE EIGHTH BLOCK}", -4.0, 1),
    ("s", -3.0, 1),
    ("t", -3.0, 1),
]


def counted(field: int, value: bytes) -> bytes:
    assert len(value) < 128
    return bytes([field << 3 | 2, len(value)]) + value


def message(kind: int = 1) -> bytes:
    """A file as the library writes it: pieces, then settings of the trainer and normalizer."""
    pieces = b"".join(
        counted(1, counted(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([24, of]))
        for text, score, of in PIECES
    )
    trainer = counted(1, b"corpus.txt") + bytes([3 << 3, kind])
    return pieces + counted(2, trainer) + counted(3, counted(1, b"identity"))


WRONG_TABLE = counted(3, counted(2, b"\xff" * 9))


def saved(folder: Path, content: bytes | None, kind: str = "T5Tokenizer") -> Path:
    (folder / "tokenizer").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"tokenizer": ["transformers", kind]}))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"model_max_length": 9}))
    if content is not None:
        (folder / "tokenizer/spiece.model").write_bytes(content)
    return folder


def test_a_prompt_is_cut_into_the_pieces_of_the_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, message()), "tokenizer", T5Tokenizer, 7)
    theirs = T5Tokenizer(
        vocab=[(text, score) for text, score, _ in PIECES]
        + [(f"<extra_id_{place}>", 0.0) for place in range(99, -1, -1)]
    )
    assert len(tokenizer) == len(PIECES) + 100
    for text, ids in {
        "a star": [3, 4, 1],
        " a  tst": [3, 5, 7, 6, 7, 1],
        "b": [5, 2, 1],
        "": [1],
    }.items():
        assert tokenizer(text).input_ids == theirs(text).input_ids == ids
    padded = tokenizer("a", padding="max_length", max_length=4)
    assert (padded.input_ids, padded.attention_mask) == ([3, 1, 0, 0], [1, 1, 0, 0])
    assert tokenizer.model_max_length == 7


@pytest.mark.parametrize(
    "content", [b"no model", message()[:-3], message(kind=2), b"", message() + WRONG_TABLE], ids=len
)
def test_what_is_no_model_of_pieces_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path, content)
    with pytest.raises(
        ModelMismatch, match=r"tokenizer/spiece\.model .* is not a SentencePiece model"
    ):
        load_tokenizer(folder, "tokenizer", T5Tokenizer, 7)


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (T5Tokenizer, r"tokenizer/tokenizer\.json is needed, or spiece\.model\."),
        (GemmaTokenizer, r"tokenizer/tokenizer\.json is needed\."),
    ],
)
def test_a_tokenizer_without_a_vocabulary_is_refused(
    tmp_path: Path, kind: type, needed: str
) -> None:
    folder = saved(tmp_path, None, kind.__name__)
    with pytest.raises(ModelMismatch, match=needed):
        load_tokenizer(folder, "tokenizer", kind, 7)
