"""Encodes images together with the settings that made them, and decodes untrusted uploads."""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from PIL.Image import Resampling

from server.errors import InvalidRequest, TooLarge

__all__ = ["MEDIA_TYPES", "ImageText", "OutputFormat", "decode", "decode_mask", "encode", "fit"]

OutputFormat = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: Mapping[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}

_READABLE = ("PNG", "JPEG", "WEBP")
_MAKER_NOTE = 0x927C
_QUALITY = 95
_SAVING: Mapping[OutputFormat, Mapping[str, int]] = {
    "jpeg": {"subsampling": 0},
    "webp": {"method": 2},
}


@dataclass(frozen=True, slots=True)
class ImageText:
    """What an image file says about how it was made.

    Attributes:
        parameters: the settings in the text format of AUTOMATIC1111, which many tools read.
        settings: the settings in full; posted back, they make the same image.
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
        output_format: of the file.
        description: written as PNG text chunks `parameters` and `weft` (iTXt where Latin-1 does
            not suffice), or as EXIF UserComment and MakerNote in JPEG and WebP.
    """
    image = Image.fromarray(pixels, mode="RGB")
    buffer = io.BytesIO()
    if output_format == "png":
        image.save(buffer, "PNG", pnginfo=_png_chunks(description))
    else:
        details = {} if description is None else {"exif": _exif(description).tobytes()}
        image.save(buffer, output_format, quality=_QUALITY, **_SAVING[output_format], **details)
    return buffer.getvalue()


def _png_chunks(description: ImageText | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    if description is not None:
        chunks.add_text("parameters", description.parameters)
        chunks.add_text("weft", description.json)
    return chunks


def _exif(description: ImageText) -> Image.Exif:
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    # AUTOMATIC1111 and its readers take "UNICODE" for big-endian UTF-16.
    tags[ExifTags.Base.UserComment] = b"UNICODE\0" + description.parameters.encode("utf-16-be")
    tags[_MAKER_NOTE] = b"weft\0" + description.json.encode()
    return exif


def decode(text: str, *, field: str, max_pixels: int) -> Image.Image:
    """Decode an uploaded image to RGB; transparency is flattened over white.

    Args:
        text: base64, or a data URI of it.
        field: the request's field, for the error message.
        max_pixels: checked against the header, before anything is decompressed.

    Raises:
        InvalidRequest: it is not a PNG, JPEG or WebP file, or is damaged.
        TooLarge: it has more than `max_pixels`.
    """
    return _flatten(_open(text, field=field, max_pixels=max_pixels), "white")


def decode_mask(text: str, *, field: str, max_pixels: int) -> Image.Image:
    """Decode an uploaded mask to grayscale; transparency is flattened over black.

    Arguments and errors are those of :func:`decode`.
    """
    return _flatten(_open(text, field=field, max_pixels=max_pixels), "black").convert("L")


def fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resample an image: uint8 `[height, width, 3]`, or `[height, width]` if grayscale."""
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.LANCZOS)
    return np.asarray(image)


def _open(text: str, *, field: str, max_pixels: int) -> Image.Image:
    data = _bytes(text, field)
    try:
        _check_webp_canvas(data, field, max_pixels)
        image = Image.open(io.BytesIO(data), formats=_READABLE)
        _check_pixels(image.width, image.height, field, max_pixels)
        if getattr(image, "n_frames", 1) > 1:
            raise InvalidRequest(field, f"{field} is an animation; send a single image.")
        image.load()
        return ImageOps.exif_transpose(image)
    except (InvalidRequest, TooLarge):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(
            field, f"{field} has too many pixels; at most {max_pixels} are allowed."
        ) from None
    except Image.UnidentifiedImageError:
        raise InvalidRequest(
            field, f"{field} is not an image in a supported format; allowed are: PNG, JPEG, WebP."
        ) from None
    except Exception:  # noqa: BLE001 - a decoder fed hostile bytes may raise anything
        raise InvalidRequest(
            field, f"{field} is a damaged image file and cannot be decoded."
        ) from None


def _bytes(text: str, field: str) -> bytes:
    encoded = text
    if text[:5].lower() == "data:":
        head, _, encoded = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidRequest(
                field,
                f"{field} is a data URI without ';base64,'; send base64 or a base64 data URI.",
            )
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            field, f"{field} is not valid base64; send base64 or a base64 data URI."
        ) from None


def _check_webp_canvas(data: bytes, field: str, max_pixels: int) -> None:
    """Refuse a large WebP by its header, because Pillow allocates before it reports the size."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        width = int.from_bytes(body[4:7], "little") + 1
        height = int.from_bytes(body[7:10], "little") + 1
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", body[6:10]))
    _check_pixels(width, height, field, max_pixels)


def _check_pixels(width: int, height: int, field: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(
            field, f"{field} is {width} x {height}; at most {max_pixels} pixels are allowed."
        )


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image).convert("RGB")
