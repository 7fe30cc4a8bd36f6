"""The client of live streams in `examples/`, as users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from tests.server.conftest import Running
from tests.server.stream_client import file_of, pixels_of

EXAMPLE = Path(__file__).parents[4] / "examples" / "stream.py"
SETTINGS = json.dumps({"steps": 2, "seed": 5})


def stream(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments), "--settings", SETTINGS],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


@pytest.fixture
def server(running: Running) -> str:
    return running.url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "frames"
    made.mkdir()
    for number in range(5):
        (made / f"{number}.png").write_bytes(file_of(40 * number))
    return made


def test_a_folder_of_images_becomes_a_folder_of_images(server: str, folder: Path) -> None:
    painted = folder.parent / "painted"
    ran = stream(folder, painted, "--prompt", "a red circle", "--server", server)
    assert ran.returncode == 0, ran.stderr
    files = sorted(painted.iterdir())
    assert [file.name for file in files] == [f"{number:05d}.jpg" for number in range(5)]
    assert {pixels_of(file.read_bytes()).shape for file in files} == {(128, 128, 3)}
    assert len({file.read_bytes() for file in files}) == 5
    said = r"5 frames sent, 5 images, 0 dropped, [\d.]+ frames/s, median latency \d+ ms"
    assert re.fullmatch(said, ran.stdout.strip())


def test_an_animation_becomes_an_animation(server: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (80 * number, 0, 0)) for number in range(3)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:])
    source, painted = tmp_path / "in.gif", tmp_path / "out.gif"
    socket = server.replace("http", "ws")
    ran = stream(source, painted, "--prompt", "a red circle", "--server", socket)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("3 frames sent, 3 images")
    with Image.open(painted) as image:
        assert image.format == "GIF"
        assert len(list(ImageSequence.Iterator(image))) == 3


def test_a_video_without_ffmpeg_and_a_refused_setting_are_one_sentence(
    server: str, folder: Path
) -> None:
    video = folder.parent / "clip.mp4"
    video.write_bytes(b"no image")
    out = folder.parent / "painted"
    prompt = ("--prompt", "a red circle", "--server", server)
    ran = stream(video, out, *prompt, PATH="")
    expected = f"stream.py: {video} is not an image; to stream a video, install ffmpeg.\n"
    assert (ran.returncode, ran.stderr) == (1, expected)
    ran = stream(folder, out, "--prompt", "x" * 9000, "--server", server)
    assert ran.returncode == 1
    assert re.fullmatch(r"stream\.py: prompt .*\.\n", ran.stderr)


def test_an_address_without_its_protocol_is_refused_in_a_sentence(folder: Path) -> None:
    ran = stream(folder, folder.parent, "--prompt", "a red circle", "--server", "127.0.0.1:8000")
    assert ran.returncode == 1
    assert re.fullmatch(r"stream.py: 127.0.0.1:8000/v1/stream isn't a valid URI: .*\n", ran.stderr)


def test_a_video_is_read_through_ffmpeg(server: str, folder: Path) -> None:
    """A stand-in for the program writes what ffmpeg writes: one JPEG file after another."""
    folder_of_programs = folder.parent / "programs"
    folder_of_programs.mkdir()
    frames = b"".join(file_of(80 * number, kind="JPEG") for number in range(3))
    (folder.parent / "piped").write_bytes(frames)
    program = folder_of_programs / "ffmpeg"
    program.write_text(f"#!/bin/sh\nexec cat {folder.parent / 'piped'}\n")
    program.chmod(0o755)
    video = folder.parent / "clip.mp4"
    video.write_bytes(b"no image")
    path = f"{folder_of_programs}:{os.environ['PATH']}"
    out = folder.parent / "painted"
    ran = stream(video, out, "--prompt", "a red circle", "--server", server, PATH=path)
    assert ran.returncode == 0, ran.stderr
    assert len(list(out.iterdir())) == 3


def test_the_help_has_an_example() -> None:
    ran = stream("--help")
    assert ran.returncode == 0
    assert "python examples/stream.py clip.mp4 painted/ --prompt" in ran.stdout
