"""The process that decodes: reads jobs from its standard input and writes pixels to its output.

An empty line says that it is ready. A job is a line of JSON, :class:`DecodingJob`, and the bytes
that it announces. The answer is a line of JSON, :class:`Answer`, and the pixels that it announces.
The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

# Pillow loads a format's module when it first meets the format.
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from server.decoding.picture import MaskForm, decode_mask, decode_picture, file_of
from server.decoding.sizing import PictureTarget, brought_to
from server.decoding.texts import texts_of
from server.errors import InvalidRequest, TooLarge

__all__ = ["NICENESS", "Answer", "DecodingJob", "decoded", "main"]

FORMATS = JpegImagePlugin, PngImagePlugin, WebPImagePlugin

NICENESS = 5
"""Where models run on the processor, decoding has a quarter of a core that both want."""


@dataclass(frozen=True, slots=True)
class DecodingJob:
    """What to decode.

    Attributes:
        length: bytes that follow.
        field: the request's field, for error messages.
        texts: whether its texts are asked for, rather than its pixels.
        mask: its form, if it is a mask, which is decoded to grayscale; None for a picture.
        encoded: whether the bytes are base64 or a data URI, rather than a file.
        max_pixels: of the picture.
        target: what it is brought to.
        max_resampled: pixels of the result; a picture that would get more keeps its own size.
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
    """What became of a job.

    Attributes:
        shape: `[height, width, 3]`, or `[height, width]` of a mask, uint8.
        refusal: the sentence for the user; None if the pixels follow.
        too_large: whether the refusal is that of a picture that is too large.
        texts: that the picture contains, by their names, if they were asked for.
    """

    shape: tuple[int, ...] = (0,)
    refusal: str | None = None
    too_large: bool = False
    texts: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Decode until the input ends; the argument is how many bytes of memory the process may use."""
    os.nice(NICENESS)
    _bound(int(sys.argv[1]))
    # Whatever a library prints must not end up between the pixels.
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
    """What a job asks for.

    Raises:
        InvalidRequest: the bytes are not such a picture.
    """
    if job.encoded:
        data = file_of(data, job.field)
    if job.mask is None:
        image = decode_picture(data, field=job.field, max_pixels=job.max_pixels)
    else:
        image = decode_mask(data, field=job.field, max_pixels=job.max_pixels, form=job.mask)
    return brought_to(image, job.target, job.max_resampled)


if __name__ == "__main__":
    main()
