"""The cases of the promise about names, and that opened files would be noticed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.promises.names import DEPTH, texts
from benchmarks.promises.opened import watched


def test_the_kernel_tells_of_files_that_any_process_opens_and_of_no_others(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner/file"
    file.write_text("x")
    with watched(tmp_path) as opened:
        assert file.is_file()
        assert opened() == set()
        subprocess.run([sys.executable, "-c", f"open({str(file)!r})"], check=True)
        assert opened() == {"file"}
        assert opened() == set()


def test_each_text_of_a_schema_is_tried_in_turn_beside_what_is_needed() -> None:
    parts: dict[str, Any] = {
        "Adapter": {"properties": {"name": {"type": "string"}, "weight": {"type": "number"}}},
        "Rule": {"properties": {"name": {"const": "cfg", "type": "string"}, "of": {"$ref": "Of"}}},
        "Of": {"type": "string"},
    }
    schema = {
        "properties": {
            "prompt": {"type": "string"},
            "steps": {"type": "integer"},
            "adapters": {
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"$ref": "#/schemas/Adapter"}]},
            },
            "rule": {"oneOf": [{"$ref": "#/schemas/Rule"}]},
        }
    }
    cheap = {"prompt": "x", "steps": 1}
    assert [*texts(schema, parts, "../a", DEPTH)] == [
        {**cheap, "prompt": "../a"},
        {**cheap, "adapters": ["../a"]},
        {**cheap, "adapters": [{"name": "../a"}]},
        {**cheap, "rule": {"name": "cfg", "of": "../a"}},
    ]
