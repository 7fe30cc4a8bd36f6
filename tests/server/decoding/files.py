"""Picture files written by hand, some of them hostile."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of these packed rows; further chunks come before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    each = len(rows) // height
    filtered = b"".join(b"\0" + rows[k * each : (k + 1) * each] for k in range(height))
    pieces = {"IHDR": header, **chunks, "IDAT": zlib.compress(filtered), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name.encode() + body + _checksum(name.encode() + body)
        for name, body in pieces.items()
    )


def _checksum(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def thin_png(height: int) -> bytes:
    """A PNG one pixel wide: a few kilobytes, for which a decoder allocates a pointer per row."""
    return png(1, height, 1, GREY, bytes(height))


def repeated_scans(width: int, height: int, times: int) -> bytes:
    """A progressive JPEG that repeats its last scan; each scan covers the whole picture again."""
    data = saved(Image.new("RGB", (width, height), (100, 150, 200)), "JPEG", progressive=True)
    begin, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[begin:end] * times + data[end:]
