"""Pictures of every kind are decoded correctly; hostile files are refused by their header."""

import base64
import struct
import zlib
from math import erf

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server.decoding.picture import (
    MAX_SCANS,
    MaskForm,
    Repaints,
    decode_mask,
    decode_picture,
    file_of,
)
from server.errors import InvalidRequest, TooLarge
from server.image_codec import OutputFormat, encode
from tests.server.decoding.files import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    PALETTE,
    png,
    repeated_scans,
    saved,
    thin_png,
)

FORMATS: tuple[OutputFormat, ...] = ("png", "jpeg", "webp")
LIMIT = 64 * 64


def gradient(width: int = 32, height: int = 24) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 8, y * 8, (x + y) * 4], axis=-1).clip(0, 255).astype(np.uint8)


def picture(data: bytes, max_pixels: int = LIMIT) -> Image.Image:
    return decode_picture(data, field="image", max_pixels=max_pixels)


def mask(data: bytes) -> Image.Image:
    return decode_mask(data, field="mask", max_pixels=LIMIT)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_is_what_was_encoded(file_format: OutputFormat) -> None:
    decoded = picture(encode(gradient(), file_format))
    assert decoded.size == (32, 24)
    error = np.abs(np.asarray(decoded).astype(int) - gradient()).mean()
    assert error == 0 if file_format == "png" else error < 4


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "DATA:;base64,"])
def test_a_file_is_read_from_base64_and_data_uris(head: str) -> None:
    data = encode(gradient(), "png")
    text = head + base64.encodebytes(data).decode()
    assert file_of(text.encode(), "image") == data


@pytest.mark.parametrize("text", ["%%%", "abc", "data:image/png,abcd", "http://example.com/a.png"])
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^image is .*base64"):
        file_of(text.encode(), "image")


# Two pixels, from the definitions of the format: a dark one, and white.
DARK = 64
KINDS = {
    "1 bit": png(2, 1, 1, GREY, b"\x40"),
    "2 bits": png(2, 1, 2, GREY, b"\x70"),
    "4 bits": png(2, 1, 4, GREY, b"\x4f"),
    "16 bits": png(2, 1, 16, GREY, struct.pack(">HH", DARK * 257, 65535)),
    "16 bits a colour": png(2, 1, 16, COLOUR, struct.pack(">6H", *[DARK * 257] * 3, *[65535] * 3)),
    "16 bits and alpha": png(2, 1, 16, GREY_ALPHA, struct.pack(">4H", DARK * 257, *[65535] * 3)),
    "8 bits and alpha": png(2, 1, 8, GREY_ALPHA, bytes([DARK, 255, 255, 255])),
    "palette": png(2, 1, 8, PALETTE, b"\x01\x00", PLTE=bytes([255] * 3 + [DARK] * 3)),
    "palette of 4 bits": png(2, 1, 4, PALETTE, b"\x10", PLTE=bytes([255] * 3 + [DARK] * 3)),
    "transparent colour of 2 bits": png(2, 1, 2, GREY, b"\x70", tRNS=struct.pack(">H", 3)),
    "transparent colour of 16 bits": png(
        2, 1, 16, GREY, struct.pack(">HH", DARK * 257, 1000), tRNS=struct.pack(">H", 1000)
    ),
    "transparent colour of 16 bits each": png(
        2,
        1,
        16,
        COLOUR,
        struct.pack(">6H", *[DARK * 257] * 3, *[1000] * 3),
        tRNS=struct.pack(">3H", *[1000] * 3),
    ),
    "transparent palette entry": png(
        2, 1, 8, PALETTE, b"\x01\x00", PLTE=bytes([9] * 3 + [DARK] * 3), tRNS=b"\x00"
    ),
    "palette with alpha": png(
        2, 1, 8, PALETTE, b"\x01\x00", PLTE=bytes([255] * 3 + [0] * 3), tRNS=b"\x80\xbf"
    ),
}
LEVELS = {"1 bit": 0, "2 bits": 85, "4 bits": 68, "transparent colour of 2 bits": 85}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_has_its_own_brightness(kind: str) -> None:
    dark, light = np.asarray(picture(KINDS[kind]))[0]
    assert light.tolist() == [255] * 3
    assert dark.tolist() == pytest.approx([LEVELS.get(kind, DARK)] * 3, abs=1)


def test_a_mask_of_16_bits_keeps_its_levels() -> None:
    ramp = png(3, 1, 16, GREY, struct.pack(">HHH", 0, 128 * 257, 65535))
    assert np.asarray(mask(ramp))[0].tolist() == [0, 128, 255]


def test_the_transparent_part_of_a_mask_is_kept() -> None:
    clear_and_white = png(2, 1, 8, COLOUR_ALPHA, bytes([255, 255, 255, 0, 255, 255, 255, 255]))
    assert np.asarray(mask(clear_and_white))[0].tolist() == [0, 255]
    assert np.asarray(picture(clear_and_white))[0].tolist() == [[255] * 3] * 2


@pytest.mark.parametrize("colour", [(200, 30, 40), (10, 220, 90)])
def test_a_cmyk_jpeg_keeps_its_colours(colour: tuple[int, int, int]) -> None:
    data = saved(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
    assert picture(data).getpixel((8, 8)) == pytest.approx(colour, abs=6)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_pictures_and_masks_are_turned_as_their_exif_says(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 32, 8))
    data = saved(upright, file_format, exif=exif.tobytes())
    for turned in (np.asarray(picture(data).convert("L")), np.asarray(mask(data))):
        assert turned.shape == (32, 16)
        assert turned[:, 12].min() > 200
        assert turned[:, 3].max() < 50


@pytest.mark.parametrize(
    ("pixels", "looks"),
    [
        (Image.new("L", (8, 8), 0), "black"),
        (Image.new("RGBA", (8, 8), (255, 255, 255, 0)), "transparent"),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 255)), "black"),
    ],
    ids=["black", "transparent", "opaque black"],
)
def test_a_mask_that_would_change_nothing_is_refused(pixels: Image.Image, looks: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^mask is {looks} everywhere, so that nothing "):
        mask(saved(pixels, "PNG"))


def test_a_mask_may_repaint_what_is_clear() -> None:
    """OpenAI's masks are white everywhere and have a hole where the picture is edited."""
    pixels = np.full((4, 6, 4), 255, np.uint8)
    pixels[1:3, 2:5, 3] = 0
    hole = saved(Image.fromarray(pixels), "PNG")
    kinds: tuple[Repaints, ...] = ("clear", "own_clear")
    for repaints in kinds:
        found = np.asarray(
            decode_mask(hole, field="mask", max_pixels=LIMIT, form=MaskForm(repaints))
        )
        assert (found == 255 - pixels[..., 3]).all()


def test_a_mask_without_an_alpha_channel_repaints_what_is_white() -> None:
    plain = saved(Image.fromarray(np.eye(8, dtype=np.uint8) * 255), "PNG")
    found = decode_mask(plain, field="mask", max_pixels=LIMIT, form=MaskForm("clear"))
    assert (np.asarray(found) == np.eye(8) * 255).all()
    own = decode_mask(plain, field="image", max_pixels=LIMIT, form=MaskForm("own_clear"))
    assert not np.asarray(own).any()


def test_a_mask_may_repaint_what_is_opaque_or_the_rest_of_it() -> None:
    """AUTOMATIC1111 reads brush strokes on a transparent ground, of any color, as a mask."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[1:3, 2:5, 3] = 255
    strokes = saved(Image.fromarray(pixels), "PNG")
    form = MaskForm("opaque")
    found = np.asarray(decode_mask(strokes, field="mask", max_pixels=LIMIT, form=form))
    assert (found == pixels[..., 3]).all()
    rest = MaskForm("opaque", inverted=True)
    found = np.asarray(decode_mask(strokes, field="mask", max_pixels=LIMIT, form=rest))
    assert (found == 255 - pixels[..., 3]).all()
    whole = saved(Image.new("L", (8, 8), 255), "PNG")
    with pytest.raises(InvalidRequest, match="keeps everything"):
        decode_mask(whole, field="mask", max_pixels=LIMIT, form=rest)


def test_a_mask_is_blurred_by_a_gaussian() -> None:
    edge = np.zeros((16, 64), np.uint8)
    edge[:, 32:] = 255
    form = MaskForm(blur=(4.0, 4.0))
    blurred = decode_mask(
        saved(Image.fromarray(edge), "PNG"), field="mask", max_pixels=LIMIT, form=form
    )
    distance = (np.arange(64) - 31.5) / 4
    exact = 255 * np.array([0.5 * (1 + erf(d / 2**0.5)) for d in distance])
    assert np.abs(np.asarray(blurred)[8] - exact).max() < 5


def test_a_mask_with_an_alpha_channel_and_no_clear_pixel_is_refused() -> None:
    opaque = saved(Image.new("RGBA", (8, 8), "white"), "PNG")
    with pytest.raises(InvalidRequest, match="no transparent pixel"):
        decode_mask(opaque, field="mask", max_pixels=LIMIT, form=MaskForm("clear"))


def test_the_scans_of_a_jpeg_are_limited() -> None:
    usual = repeated_scans(32, 32, 0)
    assert picture(usual).size == (32, 32)
    with pytest.raises(TooLarge, match=rf"^image is a JPEG of \d+ scans; at most {MAX_SCANS} "):
        picture(repeated_scans(32, 32, MAX_SCANS))


def test_scans_are_not_counted_inside_other_segments_or_after_the_end() -> None:
    data = repeated_scans(32, 32, 0)
    note = b"\xff\xda" * 100
    segment = b"\xff\xe5" + struct.pack(">H", len(note) + 2) + note
    assert picture(data[:2] + segment + data[2:] + note).size == (32, 32)


@pytest.mark.parametrize("data", [thin_png(65), saved(Image.new("RGB", (65, 1)), "JPEG")])
def test_a_picture_that_is_all_rows_or_columns_is_refused(data: bytes) -> None:
    with pytest.raises(TooLarge, match=r"^image is .*; one side may be at most 64 times the other"):
        picture(data)


def png_header(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(body))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def webp_header(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg_header(width: int, height: int) -> bytes:
    plain = saved(Image.new("RGB", (16, 16)), "JPEG")
    at = plain.index(b"\xff\xc0") + 5
    return plain[:at] + struct.pack(">HH", height, width) + plain[at + 4 :]


SIDE = 16000
BOMBS = {
    "png": png_header(SIDE, SIDE),
    "jpeg": jpeg_header(SIDE, SIDE),
    "png beyond Pillow's own limit": png_header(60000, 60000),
    "webp, extended": webp_header(b"VP8X", bytes(4) + (SIDE - 1).to_bytes(3, "little") * 2),
    "webp, lossless": webp_header(
        b"VP8L", b"\x2f" + ((SIDE - 1) | (SIDE - 1) << 14).to_bytes(4, "little") + bytes(8)
    ),
    "webp, lossy": webp_header(
        b"VP8 ", b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", SIDE, SIDE)
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    with pytest.raises(TooLarge, match=r"^image .*at most 4096 (pixels )?are allowed"):
        picture(BOMBS[name])


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_damaged(file_format: OutputFormat, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = encode(noise, file_format)
    with pytest.raises(InvalidRequest, match=r"^image is (a damaged image|not an image)"):
        picture(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        saved(Image.new("RGB", (8, 8)), "GIF"),
        saved(Image.new("RGB", (8, 8)), "BMP"),
        saved(Image.new("RGB", (8, 8)), "TIFF"),
        b"RIFF\x00\x00\x00\x00WEBP",
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=["empty", "text", "svg", "gif", "bmp", "tiff", "webp head", "png head"],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^mask is (not an image|a damaged image)"):
        mask(data)


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidRequest, match="is an animation"):
        picture(data)
