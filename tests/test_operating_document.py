"""docs/operating.md compared with the settings that it documents."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_settings_is_that_of_the_server() -> None:
    command = [sys.executable, "scripts/document_settings.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def unit() -> ConfigParser:
    """The systemd unit shown in the document."""
    _, _, section = (ROOT / "docs/operating.md").read_text().partition("\n## systemd\n")
    parser = ConfigParser(interpolation=None)
    parser.read_string(dedent(section.partition("\n\n`Restart=")[0]))
    return parser


def test_systemd_does_not_start_a_server_again_whose_settings_are_refused(
    unit: ConfigParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEFT_API_KEYS", raising=False)
    refused = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"])  # noqa: S104
    assert unit["Service"]["RestartPreventExitStatus"] == str(refused.exit_code) == "2"


def test_systemd_kills_no_server_that_still_drains(unit: ConfigParser) -> None:
    assert int(unit["Service"]["TimeoutStopSec"]) > Settings().drain_s


def test_systemd_can_be_told_to_start_the_server_with_the_machine(unit: ConfigParser) -> None:
    assert unit["Install"]["WantedBy"] == "multi-user.target"
