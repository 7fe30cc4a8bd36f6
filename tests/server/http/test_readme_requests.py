"""The requests in the README, sent as it shows them: by curl, from a shell."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text("utf-8")
INDENTED = r"(?:^    .*\n|^\n)+"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_requests_of_the_readme_draw_what_it_says(running, tmp_path: Path) -> None:
    blocks = re.findall(INDENTED, README, re.MULTILINE)
    lines = "".join(block for block in blocks if "curl" in block).splitlines()
    script = "\n".join(line.removeprefix("    ") for line in lines)
    # A quarter of the size, which changes nothing that is checked below.
    script = re.sub(r'"prompt"', '"width": 64, "height": 64, "prompt"', script)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8000", running.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    events = re.findall(r"^event: (\w+)$", done.stdout, re.MULTILINE)
    assert events == ["queued", *["progress"] * 8, "completed"]
    steps, guided = {}, {}
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            settings = json.loads(picture.text["weft"])  # type: ignore[attr-defined]
        steps[file.stem] = settings["steps"]
        guided[file.stem] = settings["guidance"]["name"], settings["guidance"]["scale"]
    assert steps == {"fast": 4, "balanced": 25, "best": 20, "changed": 25, "star": 20, "shapes": 12}
    assert guided["balanced"] == guided["changed"] == guided["star"] == ("apg", 4.0)
    assert guided["best"] == ("magnitude_aware", 7.5)
    assert guided["shapes"] == ("cfg", 2.0)


def test_no_document_puts_a_picture_into_an_argument() -> None:
    """Linux takes 128 KiB in one, and `base64 -w0` is not there on a Mac."""
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(INDENTED, document.read_text("utf-8"), re.MULTILINE):
            if "curl" in block and "base64" in block:
                assert "-d @- <<END" in block, document.name
                assert "$(base64 < " in block, document.name
