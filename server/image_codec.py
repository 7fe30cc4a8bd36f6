"""Encoding of images together with the settings that made them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

__all__ = ["MEDIA_TYPES", "ImageText", "OutputFormat", "encode", "resized"]

OutputFormat = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: Mapping[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}

_MAKER_NOTE = 0x927C
_MAX_EXIF_BYTES = 2**16 - 3
"""Maximum bytes of EXIF in a JPEG."""
_QUALITY = 95
_SAVING: Mapping[OutputFormat, Mapping[str, int]] = {
    "jpeg": {"subsampling": 0},
    "webp": {"method": 2},
}


@dataclass(frozen=True, slots=True)
class ImageText:
    """Text in an image file about how it was made.

    Attributes:
        parameters: settings in the text format of AUTOMATIC1111, which many tools read.
        settings: settings in full; posted back, they make the same image.
    """

    parameters: str
    settings: Mapping[str, Any]

    @property
    def json(self) -> str:
        """The settings as one line of JSON."""
        return json.dumps(self.settings, ensure_ascii=False, separators=(",", ":"))


def encode(
    pixels: np.ndarray, output_format: OutputFormat, description: ImageText | None = None
) -> bytes:
    """Encode an image; the same pixels and description give the same bytes.

    Args:
        pixels: uint8 `[H, W, 3]`.
        output_format: format of the file.
        description: settings, written as PNG text chunks `parameters` and `weft` (iTXt where
            Latin-1 does not suffice), or as EXIF UserComment and MakerNote in JPEG and WebP. If a
            JPEG has no room for both, only the settings are written, or nothing.
    """
    image = Image.fromarray(pixels, mode="RGB")
    buffer = io.BytesIO()
    if output_format == "png":
        image.save(buffer, "PNG", pnginfo=_png_chunks(description))
    else:
        details = {} if description is None else {"exif": _exif(description, output_format)}
        image.save(buffer, output_format, quality=_QUALITY, **_SAVING[output_format], **details)
    return buffer.getvalue()


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize a picture uint8 `[h, w, 3]` to uint8 `[height, width, 3]`."""
    image = Image.fromarray(pixels, mode="RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _png_chunks(description: ImageText | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    if description is not None:
        chunks.add_text("parameters", description.parameters)
        chunks.add_text("weft", description.json)
    return chunks


def _exif(description: ImageText, output_format: OutputFormat) -> bytes:
    # AUTOMATIC1111, and tools that read its files, take "UNICODE" for big-endian UTF-16.
    comment = b"UNICODE\0" + description.parameters.encode("utf-16-be")
    note = b"weft\0" + description.json.encode()
    for written in ({ExifTags.Base.UserComment: comment, _MAKER_NOTE: note}, {_MAKER_NOTE: note}):
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif).update(written)
        data = exif.tobytes()
        if output_format != "jpeg" or len(data) <= _MAX_EXIF_BYTES:
            return data
    return b""
