"""Reading of texts in untrusted picture files about how the pictures were made."""

from __future__ import annotations

from typing import Final

from PIL import ExifTags

from server.decoding.picture import open_picture

__all__ = ["texts_of"]

MAX_CHARACTERS: Final = 2**16
"""Maximum length of all texts together."""

_CODE_BYTES: Final = 8
"""Length of the encoding's name, with which a comment begins."""


def texts_of(data: bytes, *, field: str, max_pixels: int) -> dict[str, str]:
    """Read the texts of a PNG by name, or the comment of a JPEG or WebP as `parameters`.

    Texts that would exceed `MAX_CHARACTERS` characters in total are left out. Arguments and errors
    are those of :func:`server.decoding.picture.decode_picture`.
    """
    image = open_picture(data, field, max_pixels)
    found = {name: text for name, text in image.info.items() if isinstance(text, str)}
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes) and "parameters" not in found:
        found["parameters"] = _read(comment)
    texts: dict[str, str] = {}
    for name, text in found.items():
        size = sum(len(key) + len(value) for key, value in texts.items())
        if size + len(name) + len(text) <= MAX_CHARACTERS:
            texts[str(name)] = str(text)
    return texts


def _read(comment: bytes) -> str:
    code, text = comment[:_CODE_BYTES], comment[_CODE_BYTES:]
    # Comments marked "UNICODE" are big-endian, in AUTOMATIC1111 and here.
    encoding = "utf-16-be" if code == b"UNICODE\0" else "utf-8"
    return text.decode(encoding, errors="replace").strip("\0")
