"""The decoding process: reads jobs from standard input, and writes pixels to standard output.

An empty line signals that it is ready. A job is a line of JSON, :class:`DecodingJob`, followed by
the bytes that it announces. The answer is a line of JSON, :class:`Answer`, followed by the pixels
that it announces. The process ends when its input ends.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

# Pillow loads a format's module on its first use.
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from server.decoding.picture import MaskForm, decode_mask, decode_picture, file_of
from server.decoding.sizing import PictureTarget, resize_to
from server.decoding.texts import texts_of
from server.errors import InvalidRequest, TooLarge

__all__ = ["NICENESS", "Answer", "DecodingJob", "decoded", "main"]

FORMATS = JpegImagePlugin, PngImagePlugin, WebPImagePlugin

NICENESS = 5
"""With models on the processor, decoding gets a quarter of a core that both want."""


@dataclass(frozen=True, slots=True)
class DecodingJob:
    """A picture to decode.

    Attributes:
        length: number of bytes that follow.
        field: field of the request, for error messages.
        texts: whether to read its texts instead of its pixels.
        mask: form of a mask, which is decoded to grayscale; None for a picture.
        encoded: whether the bytes are base64 or a data URI instead of a file.
        max_pixels: maximum number of pixels of the picture.
        target: size to resample to.
        max_resampled: maximum number of pixels of the result; a picture that would get more keeps
            its own size.
    """

    length: int
    field: str
    texts: bool
    mask: MaskForm | None
    encoded: bool
    max_pixels: int
    target: PictureTarget
    max_resampled: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a job.

    Attributes:
        shape: `[height, width, 3]`, or `[height, width]` for a mask, uint8.
        refusal: sentence for the user; None if the pixels follow.
        too_large: whether it was refused because the picture is too large.
        texts: texts of the picture by name, if they were requested.
    """

    shape: tuple[int, ...] = (0,)
    refusal: str | None = None
    too_large: bool = False
    texts: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Decode until the input ends; the argument is the memory limit of the process in bytes."""
    os.nice(NICENESS)
    _bound(int(sys.argv[1]))
    # Output that a library prints must not end up between the pixels.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _serve(sys.stdin.buffer, answers)


def _bound(memory: int) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    answers.write(b"\n")
    answers.flush()
    while line := jobs.readline():
        job = _job(json.loads(line))
        answer, pixels = _answer(job, jobs.read(job.length))
        answers.write(json.dumps(asdict(answer)).encode() + b"\n")
        answers.write(pixels)
        answers.flush()


def _job(fields: dict[str, Any]) -> DecodingJob:
    job = replace(DecodingJob(**fields), target=PictureTarget(**fields["target"]))
    if job.mask is None:
        return job
    form = MaskForm(**fields["mask"])
    return replace(job, mask=replace(form, blur=tuple(form.blur)))


def _answer(job: DecodingJob, data: bytes) -> tuple[Answer, bytes]:
    try:
        if job.texts:
            data = file_of(data, job.field) if job.encoded else data
            texts = texts_of(data, field=job.field, max_pixels=job.max_pixels)
            return Answer(texts=texts), b""
        image = decoded(job, data)
    except InvalidRequest as error:
        return Answer(refusal=error.message, too_large=isinstance(error, TooLarge)), b""
    except MemoryError:
        sentence = f"{job.field} needs more memory than decoding it may use."
        return Answer(refusal=sentence, too_large=True), b""
    shape = (image.height, image.width) if job.mask else (image.height, image.width, 3)
    return Answer(shape), image.tobytes()


def decoded(job: DecodingJob, data: bytes) -> Image.Image:
    """Decode the picture or mask of a job.

    Raises:
        InvalidRequest: the bytes are not such a picture.
    """
    if job.encoded:
        data = file_of(data, job.field)
    if job.mask is None:
        image = decode_picture(data, field=job.field, max_pixels=job.max_pixels)
    else:
        image = decode_mask(data, field=job.field, max_pixels=job.max_pixels, form=job.mask)
    return resize_to(image, job.target, job.max_resampled)


if __name__ == "__main__":
    main()
