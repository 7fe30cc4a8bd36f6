import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server.errors import InvalidRequest, TooLarge
from server.image_codec import ImageText, OutputFormat, decode, decode_mask, encode, fit

FORMATS: tuple[OutputFormat, ...] = ("png", "jpeg", "webp")
LIMIT = 64 * 64


def gradient(width: int = 32, height: int = 24) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 8, y * 8, (x + y) * 4], axis=-1).clip(0, 255).astype(np.uint8)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def read_back(data: bytes, file_format: OutputFormat) -> tuple[str, dict[str, object]]:
    image = Image.open(io.BytesIO(data))
    if file_format == "png":
        return image.text["parameters"], json.loads(image.text["weft"])  # type: ignore[attr-defined]
    tags = image.getexif().get_ifd(0x8769)
    text, note = tags[0x9286], tags[0x927C]
    assert text.startswith(b"UNICODE\0")
    return text[8:].decode("utf-16-be"), json.loads(note.removeprefix(b"weft\0"))


@pytest.mark.parametrize("prompt", ["a red circle", "ein roter Kreis, größer", "赤い円 🔴"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_carries_its_settings(file_format: OutputFormat, prompt: str) -> None:
    settings = {"prompt": prompt, "steps": 4}
    data = encode(gradient(), file_format, ImageText(f"{prompt}\nSteps: 4", settings))
    assert read_back(data, file_format) == (f"{prompt}\nSteps: 4", settings)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_longest_prompts_fit_the_metadata(file_format: OutputFormat) -> None:
    prompt = "\n" * 8192
    settings = {"prompt": prompt, "negative_prompt": "赤" * 2730}
    data = encode(gradient(), file_format, ImageText(prompt, settings))
    assert read_back(data, file_format) == (prompt, settings)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_pixels_are_the_same_bytes(file_format: OutputFormat) -> None:
    made = [encode(gradient(), file_format, ImageText("x", {"seed": 1})) for _ in range(2)]
    assert made[0] == made[1]


def test_png_keeps_every_pixel() -> None:
    decoded = decode(b64(encode(gradient(), "png")), field="image", max_pixels=LIMIT)
    assert np.array_equal(fit(decoded, 32, 24), gradient())


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "DATA:;base64,"])
def test_a_picture_is_read_from_base64_and_data_uris(file_format: OutputFormat, head: str) -> None:
    text = head + b64(encode(gradient(), file_format))
    decoded = decode(text, field="image", max_pixels=LIMIT)
    assert decoded.size == (32, 24)
    assert np.abs(fit(decoded, 32, 24).astype(int) - gradient()).mean() < 4


def test_transparency_becomes_white_in_a_picture_and_black_in_a_mask() -> None:
    clear = b64(saved(Image.new("RGBA", (16, 16), (200, 0, 0, 0)), "PNG"))
    picture = decode(clear, field="image", max_pixels=LIMIT)
    mask = decode_mask(clear, field="mask", max_pixels=LIMIT)
    assert picture.getpixel((3, 3)) == (255, 255, 255)
    assert mask.getpixel((3, 3)) == 0
    assert fit(mask, 8, 8).shape == (8, 8)


def test_a_picture_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(gradient(32, 16)), "JPEG", exif=exif.tobytes())
    assert decode(b64(data), field="image", max_pixels=LIMIT).size == (16, 32)


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
        decode(b64(BOMBS[name]), field="image", max_pixels=LIMIT)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_damaged(file_format: OutputFormat, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = encode(noise, file_format)
    with pytest.raises(InvalidRequest, match=r"^image is (a damaged image|not an image)"):
        decode(b64(data[: int(len(data) * share)]), field="image", max_pixels=LIMIT)


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
        decode_mask(b64(data), field="mask", max_pixels=LIMIT)


@pytest.mark.parametrize("text", ["%%%", "abc", "data:image/png,abcd", "http://example.com/a.png"])
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^image is .*base64"):
        decode(text, field="image", max_pixels=LIMIT)


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidRequest, match="is an animation"):
        decode(b64(data), field="image", max_pixels=LIMIT)
