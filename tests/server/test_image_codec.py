import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server.image_codec import ImageText, OutputFormat, encode

FORMATS: tuple[OutputFormat, ...] = ("png", "jpeg", "webp")


def gradient(width: int = 32, height: int = 24) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 8, y * 8, (x + y) * 4], axis=-1).clip(0, 255).astype(np.uint8)


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


def test_of_what_a_jpeg_has_no_room_for_the_settings_are_kept_or_nothing() -> None:
    for size, kept in ((20_000, [0x927C]), (70_000, [])):
        text = ImageText("x" * 30_000, {"prompt": "x" * size})
        image = Image.open(io.BytesIO(encode(gradient(), "jpeg", text)))
        assert list(image.getexif().get_ifd(0x8769)) == kept
        assert read_back(encode(gradient(), "webp", text), "webp")[1] == text.settings


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_pixels_are_the_same_bytes(file_format: OutputFormat) -> None:
    made = [encode(gradient(), file_format, ImageText("x", {"seed": 1})) for _ in range(2)]
    assert made[0] == made[1]


def test_png_keeps_every_pixel() -> None:
    read = Image.open(io.BytesIO(encode(gradient(), "png")))
    assert np.array_equal(np.asarray(read), gradient())
