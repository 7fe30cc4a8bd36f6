"""Decoding of untrusted PNG, JPEG and WebP files; needs nothing but Pillow."""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from dataclasses import dataclass
from typing import Final, Literal

from PIL import Image, ImageChops, ImageFilter, ImageOps

from server.errors import InvalidRequest, TooLarge

__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_SCANS",
    "MaskForm",
    "Repaints",
    "decode_mask",
    "decode_picture",
    "file_of",
    "open_picture",
]

Repaints = Literal["white", "clear", "own_clear", "opaque", "acts"]


@dataclass(frozen=True, slots=True)
class MaskForm:
    """How a file marks the part of a picture that is repainted.

    Attributes:
        repaints: `white` repaints the white part, with transparency read as black. `clear` repaints
            the transparent part, as in OpenAI's masks; `own_clear` does the same for the picture
            itself, which need not have one. `opaque` repaints the opaque part, as in
            AUTOMATIC1111's masks. A file without transparency is read as `white`, or as nothing for
            `own_clear`. `acts` is like `white`, for a mask that marks where something acts and not
            what is repainted.
        inverted: whether the rest is repainted instead.
        blur: standard deviation of the Gaussian blur of the mask, in its own pixels, along its
            width and its height.
    """

    repaints: Repaints = "white"
    inverted: bool = False
    blur: tuple[float, float] = (0.0, 0.0)


WHITE: Final = MaskForm()

HALF: Final = 128
"""Opacity above which AUTOMATIC1111 repaints."""

MAX_ASPECT_RATIO: Final = 64
"""Maximum ratio of the sides: a PNG of 1 x 8388608 takes 467 MB, because every row has its own
pointer and padding."""

MAX_SCANS: Final = 32
"""Maximum number of scans of a progressive JPEG. Each visits the whole picture, even if it has only
a few bytes. Encoders write about ten."""

_READABLE = ("PNG", "JPEG", "WEBP")
_BLANKS = b" \t\n\r\f\v"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_STANDALONE = frozenset({0x01, 0xD8})


def file_of(text: bytes, field: str) -> bytes:
    """Decode the file in base64 or in a base64 data URI.

    Raises:
        InvalidRequest: it is not base64.
    """
    encoded = text
    if text[:5].lower() == b"data:":
        head, _, encoded = text.partition(b",")
        if not head.lower().endswith(b";base64"):
            raise InvalidRequest(
                field,
                f"{field} is a data URI without ';base64,'; send base64 or a base64 data URI.",
            )
    try:
        return base64.b64decode(encoded.translate(None, _BLANKS), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            field, f"{field} is not valid base64; send base64 or a base64 data URI."
        ) from None


def decode_picture(data: bytes, *, field: str, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB; transparency is flattened over white.

    Args:
        data: content of the file.
        field: field of the request, for the error message.
        max_pixels: maximum number of pixels, checked against the header before decompression.

    Raises:
        InvalidRequest: it is not a PNG, JPEG or WebP file, or is damaged.
        TooLarge: it has more than `max_pixels`, more than `MAX_SCANS` scans, or is more than
            `MAX_ASPECT_RATIO` times as long as it is wide or high.
    """
    return _flatten(open_picture(data, field, max_pixels), "white")


def decode_mask(data: bytes, *, field: str, max_pixels: int, form: MaskForm = WHITE) -> Image.Image:
    """Decode a mask to grayscale, with white where the picture is repainted.

    Errors are those of :func:`decode_picture`; a mask that would change nothing is an
    `InvalidRequest` too.

    Args:
        data: content of the file.
        field: field of the request, for the error message.
        max_pixels: maximum number of pixels, checked against the header.
        form: how the file marks what is repainted.
    """
    mask = _repainted(open_picture(data, field, max_pixels), field, form.repaints)
    if form.inverted:
        mask = ImageChops.invert(mask)
    if mask.getextrema() == (0, 0) and form.repaints != "own_clear":
        raise InvalidRequest(
            field, f"{field} keeps everything, so that nothing would be repainted."
        )
    return mask.filter(ImageFilter.GaussianBlur(form.blur)) if any(form.blur) else mask


def open_picture(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Decode a picture unchanged; arguments and errors are those of :func:`decode_picture`."""
    try:
        _check_webp_canvas(data, field, max_pixels)
        image = Image.open(io.BytesIO(data), formats=_READABLE)
        _check_size(image.width, image.height, field, max_pixels)
        if image.format == "JPEG":
            _check_scans(data, field)
        if getattr(image, "n_frames", 1) > 1:
            raise InvalidRequest(field, f"{field} is an animation; send a single image.")
        image.load()
        return ImageOps.exif_transpose(_of_eight_bits(image, data))
    except (InvalidRequest, TooLarge):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(
            field, f"{field} has too many pixels; at most {max_pixels} are allowed."
        ) from None
    except MemoryError:
        raise TooLarge(
            field, f"{field} needs more memory to decode than an image of its size should."
        ) from None
    except Image.UnidentifiedImageError:
        raise InvalidRequest(
            field, f"{field} is not an image in a supported format; allowed are: PNG, JPEG, WebP."
        ) from None
    except Exception:  # noqa: BLE001 - a decoder fed hostile bytes may raise anything
        raise InvalidRequest(
            field, f"{field} is a damaged image file and cannot be decoded."
        ) from None


def _check_webp_canvas(data: bytes, field: str, max_pixels: int) -> None:
    """Refuse a large WebP by its header, since Pillow allocates before it reports the size."""
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
    _check_size(width, height, field, max_pixels)


def _check_size(width: int, height: int, field: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(
            field, f"{field} is {width} x {height}; at most {max_pixels} pixels are allowed."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise TooLarge(
            field,
            f"{field} is {width} x {height}; one side may be at most {MAX_ASPECT_RATIO} times the "
            "other.",
        )


def _check_scans(data: bytes, field: str) -> None:
    scans = _scans(data)
    if scans > MAX_SCANS:
        raise TooLarge(
            field, f"{field} is a JPEG of {scans} scans; at most {MAX_SCANS} are allowed."
        )


def _scans(data: bytes) -> int:
    """Number of scans of a JPEG, counted by their markers, without decoding."""
    scans, position = 0, 0
    while marker := _MARKER.search(data, position):
        kind, position = data[marker.start() + 1], marker.end()
        if kind == _END_OF_IMAGE:
            break
        if kind == _START_OF_SCAN:
            scans += 1
        if kind not in _STANDALONE:
            position += int.from_bytes(data[position : position + 2], "big")
    return scans


def _of_eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Convert an image to 8 bits per channel where Pillow does not.

    Pillow clips a grayscale PNG of 16 bits instead of scaling it, and leaves the transparent color
    of a PNG at the file's bit depth.
    """
    if image.format != "PNG":
        return image
    depth = data[24]
    clear = image.info.pop("transparency", None) if image.mode != "P" else None
    if image.mode.startswith("I"):
        values = image.convert("I")
        image = values.point([round(value / 257) for value in range(2**16)], "L")
        if clear is not None:
            opaque = values.point([0 if value == clear else 255 for value in range(2**16)], "L")
            image.putalpha(opaque)
    elif clear is not None:
        image.info["transparency"] = _scaled(clear, depth)
    return image


def _scaled(clear: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """Convert a transparent color of `depth` bits to 8 bits."""
    if isinstance(clear, tuple):
        return tuple(value >> (depth - 8) for value in clear)
    return clear * 255 // (2**depth - 1) if 1 < depth < 8 else clear


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image).convert("RGB")


def _repainted(image: Image.Image, field: str, repaints: Repaints) -> Image.Image:
    """Make a mask that is white where the file marks the picture as repainted.

    Raises:
        InvalidRequest: it marks nothing, although it should.
    """
    if repaints == "own_clear":
        return ImageChops.invert(_alpha(image))
    see_through = image.has_transparency_data
    if repaints == "clear" and see_through:
        mask = ImageChops.invert(_alpha(image))
        if mask.getextrema() == (0, 0):
            raise InvalidRequest(
                field,
                f"{field} has no transparent pixel, so that nothing would be repainted; make "
                "transparent what should change.",
            )
        return mask
    if repaints == "opaque" and see_through and _alpha(image).getextrema() != (255, 255):
        return _alpha(image).point([255 if value > HALF else 0 for value in range(256)])
    mask = _flatten(image, "black").convert("L")
    if mask.getextrema() == (0, 0):
        clear = see_through and _alpha(image).getextrema() == (0, 0)
        without, wanted = (
            ("it would act nowhere", "where it should")
            if repaints == "acts"
            else ("nothing would be repainted", "what should change")
        )
        raise InvalidRequest(
            field,
            f"{field} is {'transparent' if clear else 'black'} everywhere, so that {without}; "
            f"paint white and opaque {wanted}.",
        )
    return mask


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")
