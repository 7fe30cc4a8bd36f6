"""Stream a folder of images, an animation or a video through a Weft server.

It needs the packages `websockets` and `pillow`, and the program `ffmpeg` for videos. The server's
key, if there is one, is read from the environment variable WEFT_API_KEY. Example:

    python examples/stream.py clip.mp4 painted/ --prompt "a watercolour of a city" --fps 10

docs/streaming.md describes the messages.
"""

import argparse
import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI

FILES = {".png", ".jpg", ".jpeg", ".webp"}
JPEG_END = b"\xff\xd9"


class Progress:
    """The progress of a stream.

    Attributes:
        sent: time at which each frame was sent, in seconds of a clock.
        arrived: time at which each image came back.
        latencies: seconds from sending a frame to receiving its image.
        images: received images, as files.
        dropped: number of frames that newer ones replaced before the server accepted them.
    """

    def __init__(self) -> None:
        self.sent: list[float] = []
        self.arrived: list[float] = []
        self.latencies: list[float] = []
        self.images: list[bytes] = []
        self.dropped = 0
        self._settled = -1
        self._news = asyncio.Event()

    def settle(self, source: int) -> None:
        """Note that a frame, and thus all before it, was answered, failed or was dropped."""
        self._settled = max(self._settled, source)
        self._news.set()

    async def until_settled(self, source: int) -> None:
        """Wait until a frame was answered, failed or was dropped."""
        while self._settled < source:
            self._news.clear()
            await self._news.wait()


def main() -> None:
    """Read the command line, stream, and write what came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of images, GIF, WebP or video file")
    parser.add_argument("output", type=Path, help="folder to be written, or a file ending in .gif")
    parser.add_argument("--prompt", required=True, help="describes the images")
    parser.add_argument(
        "--server", default="http://127.0.0.1:8000", help="its address; default: %(default)s"
    )
    parser.add_argument(
        "--fps",
        type=float,
        default=0,
        help="frames sent per second; the server drops those that it has no time for. "
        "0, the default, waits for each image before it sends the next frame",
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={},
        help='JSON with further settings, such as \'{"steps": 4, "strength": 0.6}\'',
    )
    options = parser.parse_args()
    settings = {"prompt": options.prompt, **options.settings}
    try:
        files = frames(options.source)
        progress = asyncio.run(stream(options.server, settings, files, options.fps))
        write(progress, options.output)
    except (OSError, RuntimeError, InvalidStatus, InvalidURI, ConnectionClosed) as error:
        sys.exit(f"stream.py: {error}")
    report(progress)


def frames(source: Path) -> Iterator[bytes]:
    """The frames of a folder, an animation or a video, as image files."""
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in FILES)
        return (file.read_bytes() for file in files)
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        return of_video(source)
    return (jpeg(frame) for frame in ImageSequence.Iterator(image))


def of_video(source: Path) -> Iterator[bytes]:
    """The frames of a video, read by the program ffmpeg."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise RuntimeError(f"{source} is not an image; to stream a video, install ffmpeg.")
    command = [ffmpeg, "-loglevel", "error", "-i", str(source)]
    command += ["-f", "image2pipe", "-c:v", "mjpeg", "-q:v", "3", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        rest = b""
        while process.stdout and (read := process.stdout.read(1 << 16)):
            *whole, rest = (rest + read).split(JPEG_END)
            yield from (one + JPEG_END for one in whole)
    if process.returncode:
        raise RuntimeError(f"ffmpeg could not read {source}.")


def jpeg(frame: Image.Image) -> bytes:
    """A frame as a JPEG file."""
    file = io.BytesIO()
    frame.convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


async def stream(
    server: str, settings: dict[str, Any], files: Iterator[bytes], fps: float
) -> Progress:
    """Send frames and collect the images that come back.

    Args:
        server: address of the server, as `http://HOST:PORT`, or with `https`, `ws` or `wss`.
        settings: settings of the stream.
        files: frames as image files.
        fps: frames sent per second; 0 waits for each image.
    """
    key = os.environ.get("WEFT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    progress = Progress()
    address = re.sub("^http", "ws", server.rstrip("/")) + "/v1/stream"
    async with connect(address, additional_headers=headers, max_size=None) as socket:
        await socket.send(json.dumps(settings))
        answer = json.loads(await socket.recv())
        if "error" in answer:
            raise RuntimeError(answer["error"]["message"])
        for warning in answer["warnings"]:
            print(f"Warning: {warning}", file=sys.stderr)
        receiving = asyncio.create_task(receive(socket, progress))
        sending = asyncio.create_task(send(socket, files, fps, progress))
        try:
            await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
            await (receiving if receiving.done() else sending)
        finally:
            receiving.cancel()
            sending.cancel()
    return progress


async def send(
    socket: ClientConnection, files: Iterator[bytes], fps: float, progress: Progress
) -> None:
    """Send all frames, and wait for the image of the last one."""
    while (file := await asyncio.to_thread(next, files, None)) is not None:
        progress.sent.append(perf_counter())
        await socket.send(file)
        if fps:
            await asyncio.sleep(1 / fps)
        else:
            await progress.until_settled(len(progress.sent) - 1)
    await progress.until_settled(len(progress.sent) - 1)


async def receive(socket: ClientConnection, progress: Progress) -> None:
    """Collect images until the socket closes."""
    async for message in socket:
        said = json.loads(message)
        if "frame" in said and "error" not in said:
            progress.images.append(bytes(await socket.recv(decode=False)))
            progress.arrived.append(perf_counter())
            progress.latencies.append(progress.arrived[-1] - progress.sent[said["source"]])
            progress.dropped = said["dropped"]
        elif "source" in said:
            print(f"Frame {said['source']}: {said['error']['message']}", file=sys.stderr)
        else:
            raise RuntimeError(said["error"]["message"])
        progress.settle(said["source"])
    raise RuntimeError("the server closed the connection.")


def write(progress: Progress, output: Path) -> None:
    """Write the images to a folder, or as one GIF at the rate at which they arrived."""
    if not progress.images:
        raise RuntimeError("no image came back.")
    if output.suffix.lower() == ".gif":
        first, *others = [Image.open(io.BytesIO(image)) for image in progress.images]
        seconds = (progress.arrived[-1] - progress.arrived[0]) / max(1, len(others))
        first.save(
            output, save_all=True, append_images=others, duration=1000 * (seconds or 0.1), loop=0
        )
        return
    output.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(progress.images):
        kind = Image.open(io.BytesIO(image)).format or "JPEG"
        suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
        (output / f"{number:05d}.{suffix}").write_bytes(image)


def report(progress: Progress) -> None:
    """Print the numbers of frames and images, the frame rate and the latency."""
    elapsed = progress.arrived[-1] - progress.arrived[0]
    rate = f"{(len(progress.images) - 1) / elapsed:.1f}" if elapsed else "-"
    print(
        f"{len(progress.sent)} frames sent, {len(progress.images)} images, "
        f"{progress.dropped} dropped, {rate} frames/s, "
        f"median latency {1000 * median(progress.latencies):.0f} ms"
    )


if __name__ == "__main__":
    main()
