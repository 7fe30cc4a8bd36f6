"""Reads the tensor descriptions of a GGUF file, and checks them before reading any tensor.

The layout is that of ``docs/gguf.md`` in ggml's repository, versions 2 and 3: the counts of tensors
and metadata entries, the entries, a description of each tensor, and the tensors' bytes. All lengths
are bounded by what a header can need, and all tensors must lie inside the file without overlapping,
so a file cannot cause more memory to be allocated than its own length. The only metadata used are
the alignment and the shapes of tensors that are stored in another shape.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, BinaryIO, Final

from server.errors import ModelMismatch
from server.models.gguf.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["UNQUANTIZED", "GgufTensor", "tensors_of"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

UNQUANTIZED: Final = {"F32": (0, 4), "F16": (1, 2), "BF16": (30, 2)}
"""Types that are not quantized: code and bytes per number."""

CODES: Final[Mapping[int, str]] = {
    **{code: kind for kind, (code, _) in UNQUANTIZED.items()},
    **{form.code: kind for kind, form in FORMATS.items()},
}

MAX_HEADER_BYTES: Final = 1 << 24
"""Bytes; headers of published transformers have a few hundred thousand."""

MAX_NAME_BYTES: Final = 256
MAX_DIMENSIONS: Final = 4
SHOWN: Final = 80
"""Maximum characters of a name shown in a message, as a file may contain anything."""

VALUES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Sizes in bytes of the metadata types of fixed size, by type code."""

UINT32, STRING, ARRAY = 4, 8, 9
ALIGNMENT: Final = "general.alignment"
SHAPE_OF: Final = "comfy.gguf.orig_shape."
"""Prefix of metadata entries with a tensor's original shape. Tensors with rows that are not whole
blocks are stored in rows of 256 numbers, as the tools of city96's ComfyUI-GGUF write U-Nets."""

INTEGERS: Final = {4: "I", 5: "i", 10: "Q", 11: "q"}
DEFAULT_ALIGNMENT: Final = 32
MIN_ALIGNMENT: Final = 8
MAX_ALIGNMENT: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a file.

    Attributes:
        kind: type of its numbers, a name in ``UNQUANTIZED`` or in ``FORMATS``.
        shape: shape of the tensor in torch's order of dimensions, the innermost one last.
        stored: shape in which the file stores it.
        start: offset of its bytes in the file.
        nbytes: number of its bytes.
    """

    kind: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        """Whether it is stored in blocks."""
        return self.kind in FORMATS

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of its bytes if it is quantized: rows of bytes."""
        return *self.stored[:-1], FORMATS[self.kind].row_bytes(self.stored[-1])


def tensors_of(file: Path) -> dict[str, GgufTensor]:
    """The descriptions of a file's tensors, by name.

    Args:
        file: a GGUF file.

    Raises:
        ModelMismatch: the file is not a GGUF file, or not supported; the sentence names the tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            tensors = _read(_Header(stream, min(size, MAX_HEADER_BYTES)), size)
        _check_apart(tensors)
    except _Unreadable as error:
        raise ModelMismatch(f"GGUF file {str(file)!r} {error}.") from None
    except OSError as error:
        reason = error.strerror or error
        raise ModelMismatch(f"GGUF file {str(file)!r} cannot be read: {reason}.") from None
    return tensors


class _Unreadable(Exception):
    """Reason why a file is refused, as the rest of a sentence about it."""


class _Header:
    """Reads the start of a file, up to the maximum length of a header."""

    def __init__(self, stream: BinaryIO, max_length: int) -> None:
        self._stream = stream
        self._max_length = max_length
        self.position = 0

    def take(self, count: int) -> bytes:
        self._advance(count)
        taken = self._stream.read(count)
        if len(taken) < count:
            raise _Unreadable("is cut short")
        return taken

    def skip(self, count: int) -> None:
        self._advance(count)
        self._stream.seek(count, 1)

    def number(self, form: str) -> int:
        layout = f"<{form}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, max_length: int) -> str:
        length = self.number("Q")
        if length > max_length:
            raise _Unreadable(f"has a name of {length} bytes; at most {max_length} are allowed")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _Unreadable("has a name that is not UTF-8") from None

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._max_length:
            raise _Unreadable(
                f"is cut short, or has a header of more than {MAX_HEADER_BYTES} bytes, the maximum "
                "that is read"
            )


def _read(header: _Header, size: int) -> dict[str, GgufTensor]:
    if header.take(4) != MAGIC:
        raise _Unreadable("does not begin as GGUF files do")
    if (version := header.number("I")) not in VERSIONS:
        raise _Unreadable(
            f"has the version {version}; allowed are {' and '.join(map(str, VERSIONS))}, with the "
            "bytes of numbers in little-endian order"
        )
    count, entries = header.number("Q"), header.number("Q")
    alignment = DEFAULT_ALIGNMENT
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(entries):
        key = header.text(MAX_HEADER_BYTES)
        kind = header.number("I")
        if key == ALIGNMENT and kind == UINT32:
            alignment = _checked_alignment(header.number("I"))
        elif key.startswith(SHAPE_OF) and kind == ARRAY:
            shapes[key.removeprefix(SHAPE_OF)] = _shape(header, key)
        else:
            _skip_value(header, kind, key)
    described: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = header.text(MAX_NAME_BYTES)
        if name in described:
            raise _Unreadable(f"has the tensor {name[:SHOWN]} twice")
        described[name] = _tensor(header, name, alignment, shapes.get(name))
    start = -(-header.position // alignment) * alignment
    return {name: _placed(name, one, start, size) for name, one in described.items()}


def _checked_alignment(alignment: int) -> int:
    """Check the alignment: at least the widest number's, so that tensors can be mapped in place."""
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & alignment - 1:
        raise _Unreadable(
            f"has the {ALIGNMENT} {alignment}; allowed are powers of two from {MIN_ALIGNMENT} "
            f"to {MAX_ALIGNMENT}"
        )
    return alignment


def _shape(header: _Header, key: str) -> tuple[int, ...]:
    kind, count = header.number("I"), header.number("Q")
    if kind not in INTEGERS or not 1 <= count <= MAX_DIMENSIONS:
        raise _Unreadable(
            f"has {key[:SHOWN]}, which is not a list of 1 to {MAX_DIMENSIONS} whole numbers"
        )
    return tuple(header.number(INTEGERS[kind]) for _ in range(count))


def _skip_value(header: _Header, kind: int, key: str) -> None:
    count = 1
    if kind == ARRAY:
        kind, count = header.number("I"), header.number("Q")
    if kind == STRING:
        for _ in range(count):
            header.skip(header.number("Q"))
    elif kind in VALUES:
        header.skip(count * VALUES[kind])
    else:
        raise _Unreadable(f"has metadata of the unknown type {kind} ({key[:SHOWN]})")


def _tensor(
    header: _Header, name: str, alignment: int, original: tuple[int, ...] | None
) -> GgufTensor:
    """Read a tensor's description; its start is relative to the start of all tensors."""
    dimensions = header.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _Unreadable(
            f"has the tensor {name[:SHOWN]} of {dimensions} dimensions; allowed are 1 to "
            f"{MAX_DIMENSIONS}"
        )
    stored = tuple(header.number("Q") for _ in range(dimensions))[::-1]
    shape = stored if original is None else original
    if original is not None and (prod(shape) != prod(stored) or min(shape) < 1):
        raise _Unreadable(
            f"has the tensor {name[:SHOWN]} of the shape {list(shape)}, and stores it as "
            f"{list(stored)}"
        )
    code, offset = header.number("I"), header.number("Q")
    kind = CODES.get(code)
    if kind is None:
        raise _Unreadable(
            f"has the tensor {name[:SHOWN]} of ggml's type {code}; allowed are "
            f"{', '.join((*UNQUANTIZED, *FORMATS))}"
        )
    if offset % alignment:
        raise _Unreadable(
            f"has the tensor {name[:SHOWN]} at {offset}, which is not a multiple of its alignment "
            f"{alignment}"
        )
    if kind in UNQUANTIZED:
        return GgufTensor(kind, shape, stored, offset, prod(shape) * UNQUANTIZED[kind][1])
    form = FORMATS[kind]
    if stored[-1] % form.numbers:
        raise _Unreadable(
            f"has the tensor {name[:SHOWN]} with rows of {stored[-1]} numbers in blocks of "
            f"{form.numbers} ({kind})"
        )
    nbytes = prod(stored[:-1]) * form.row_bytes(stored[-1])
    return GgufTensor(kind, shape, stored, offset, nbytes)


def _placed(name: str, tensor: GgufTensor, start: int, size: int) -> GgufTensor:
    placed = replace(tensor, start=start + tensor.start)
    if not tensor.nbytes or placed.start + placed.nbytes > size:
        raise _Unreadable(
            f"has the tensor {name[:SHOWN]} of {tensor.nbytes} bytes from {placed.start} on, and "
            f"is {size} bytes long"
        )
    return placed


def _check_apart(tensors: Mapping[str, GgufTensor]) -> None:
    """Refuse tensors that overlap, which together could be larger than the file."""
    in_order = sorted(tensors.items(), key=lambda entry: entry[1].start)
    for (_, one), (name, other) in pairwise(in_order):
        if other.start < one.start + one.nbytes:
            raise _Unreadable(f"has the tensor {name[:SHOWN]} where another one is")
