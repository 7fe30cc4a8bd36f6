"""GGUF files are not trusted: their headers are checked before memory is allocated."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from server.errors import ModelMismatch
from server.models.gguf.file import load_gguf
from server.models.gguf.header import tensors_of
from tests.server.models.gguf.files import write

Q8_0, F32, IQ1_S, I32 = 8, 0, 19, 26


class Described(NamedTuple):
    """A tensor as in a header, where the innermost dimension comes first."""

    name: bytes = b"a"
    dimensions: tuple[int, ...] = (32, 2)
    code: int = F32
    offset: int = 0


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def file_of(
    *tensors: Described,
    magic: bytes = b"GGUF",
    version: int = 3,
    count: int | None = None,
    entries: int = 0,
    metadata: bytes = b"",
    data: int = 256,
) -> bytes:
    """A file with zeros as its tensors."""
    made = magic + struct.pack("<IQQ", version, len(tensors) if count is None else count, entries)
    made += metadata
    for one in tensors:
        made += text(one.name) + struct.pack("<I", len(one.dimensions))
        made += struct.pack(f"<{len(one.dimensions)}QIQ", *one.dimensions, one.code, one.offset)
    return made + bytes(-len(made) % 32 + data)


def aligned(to: int) -> dict[str, Any]:
    entry = text(b"general.alignment") + struct.pack("<II", 4, to)
    return {"entries": 1, "metadata": entry}


def test_tensors_are_read_where_the_header_says(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    tensors = {"a.weight": torch.randn(4, 32), "b.bias": torch.randn(7), "c": torch.randn(2, 3, 5)}
    write(file, tensors, "F16")
    expected = {**tensors, "a.weight": tensors["a.weight"].half()}
    read = load_gguf(file)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], one) for name, one in expected.items())


def test_metadata_is_passed_over_but_for_the_alignment(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    metadata = text(b"general.alignment") + struct.pack("<II", 4, 64)
    metadata += text(b"names") + struct.pack("<IIQ", 9, 8, 2) + text(b"one") + text(b"two")
    metadata += text(b"sizes") + struct.pack("<IIQ3d", 9, 12, 3, 1.0, 2.0, 3.0)
    file.write_bytes(file_of(Described(), entries=3, metadata=metadata, data=320))
    [tensor] = tensors_of(file).values()
    assert (tensor.kind, tensor.shape, tensor.nbytes) == ("F32", (2, 32), 256)
    assert tensor.start % 64 == 0


def shaped(*shape: int, kind: int = 5) -> dict[str, Any]:
    entry = text(b"comfy.gguf.orig_shape.a") + struct.pack("<IIQ", 9, kind, len(shape))
    return {"entries": 1, "metadata": entry + struct.pack(f"<{len(shape)}i", *shape)}


def test_a_tensor_may_be_stored_in_another_shape(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    stored = Described(dimensions=(256, 9), code=Q8_0)
    file.write_bytes(file_of(stored, **shaped(16, 16, 3, 3), data=9 * 8 * 34))
    [tensor] = tensors_of(file).values()
    assert (tensor.shape, tensor.stored_shape) == ((16, 16, 3, 3), (9, 8 * 34))
    # Tools also write this entry for plain tensors.
    file.write_bytes(file_of(Described(), **shaped(4, 4, 2, 2)))
    assert load_gguf(file)["a"].shape == (4, 4, 2, 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is cut short"),
        (b"GGUF" + bytes(4), "has the version 0"),
        (file_of(magic=b"PK\3\4"), "does not begin as GGUF files do"),
        (file_of(version=3 << 24), "has the version 50331648; allowed are 2 and 3, with the bytes"),
        (file_of(count=1 << 63, data=0), "is cut short"),
        (file_of(entries=1 << 63), "is cut short"),
        (file_of(entries=1, metadata=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 62)), "cut short"),
        (file_of(entries=1, metadata=text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62)), "cut short"),
        (
            file_of(entries=1, metadata=text(b"k") + struct.pack("<IIQ", 9, 9, 1)),
            r"has metadata of the unknown type 9 \(k\)",
        ),
        (file_of(Described(), **aligned(48)), "has the general.alignment 48; allowed are powers"),
        (file_of(Described(), **aligned(1)), "has the general.alignment 1; allowed are powers"),
        (file_of(Described(name=bytes(300))), "has a name of 300 bytes; at most 256"),
        (file_of(Described(name=b"\xff")), "has a name that is not UTF-8"),
        (file_of(Described(), Described(offset=256), data=512), "has the tensor a twice"),
        (file_of(Described(dimensions=())), "has the tensor a of 0 dimensions; allowed are 1 to 4"),
        (file_of(Described(dimensions=(1,) * 5)), "has the tensor a of 5 dimensions"),
        (file_of(Described(code=IQ1_S)), "has the tensor a of ggml's type 19; allowed are F32, F1"),
        (file_of(Described(code=I32)), "has the tensor a of ggml's type 26; allowed are F32, F16"),
        (
            file_of(Described(offset=8)),
            "has the tensor a at 8, which is not a multiple of its alignm",
        ),
        (
            file_of(Described(dimensions=(48, 2), code=Q8_0)),
            r"has the tensor a with rows of 48 numbers in blocks of 32 \(Q8_0\)",
        ),
        (
            file_of(Described(dimensions=(32, 3))),
            "has the tensor a of 384 bytes from 96 on, and is",
        ),
        (file_of(Described(dimensions=(1 << 63,) * 4)), "has the tensor a of 2894"),
        (file_of(Described(dimensions=(0, 2))), "has the tensor a of 0 bytes"),
        (file_of(Described(offset=1 << 62)), "has the tensor a of 256 bytes from 461168"),
        (
            file_of(Described(), **shaped(2, 31)),
            r"has the tensor a of the shape \[2, 31\], and stor",
        ),
        (
            file_of(Described(), **shaped(-2, -32)),
            r"has the tensor a of the shape \[-2, -32\], and",
        ),
        (
            file_of(Described(), **shaped(1, 1, 1, 2, 32)),
            "orig_shape.a, which is not a list of 1 to 4",
        ),
        (
            file_of(Described(), **shaped(2, 32, kind=6)),
            "orig_shape.a, which is not a list of 1 to 4",
        ),
        (
            file_of(Described(), Described(name=b"b", offset=128), data=512),
            "has the tensor b where another one is",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelMismatch, match=f"^GGUF file '.*x.gguf' .*{sentence}"):
        tensors_of(file)


def test_no_byte_of_a_header_lets_a_tensor_lie_outside_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    tensors = Described(code=Q8_0), Described(name=b"b", offset=96)
    whole = file_of(*tensors, **aligned(32), data=352)
    for place in range(len(whole) - 352):
        file.write_bytes(whole[:place] + bytes([0xFF - whole[place]]) + whole[place + 1 :])
        try:
            read = load_gguf(file)
        except ModelMismatch:
            continue
        assert sum(one.nbytes for one in read.values()) <= len(whole)
