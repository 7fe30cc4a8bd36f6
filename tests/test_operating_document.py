"""docs/operating.md against the settings that it documents."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_settings_is_that_of_the_server() -> None:
    command = [sys.executable, "scripts/document_settings.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
