"""The installation script, with a stand-in for Python that records what it is asked to install."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "install.sh"

PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-c "*version_info*) [ ! -e "$(dirname "$0")/old" ] ;;
    "-c "*) ;;
    "-m pip --version") [ ! -e "$(dirname "$0")/no pip" ] ;;
    "-m ensurepip") rm "$(dirname "$0")/no pip" ;;
    "-m venv --clear "*) mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"; cp "$0" "$4/bin/python" ;;
    "-m pip config list")
        echo "$CONFIGURED"
        sleep 0.2
        echo "global.timeout='60'" ;;
    *" --target "*" -r requirements/uv.lock")
        target="$*"
        target=${target#* --target }
        target=${target% -r *}
        mkdir -p "$target/bin"
        echo 'echo "uv with ${SSL_CERT_FILE:-its own certificates}" >>"$ASKED"' >"$target/bin/uv"
        chmod +x "$target/bin/uv" ;;
    *) echo "$*" >>"$ASKED" ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "of a user" / "python3"
    path.parent.mkdir()
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


INDEX = "global.index-url='https://packages.example/simple'"


def installed(
    python: Path, folder: Path, configured: str = INDEX, **more: str
) -> subprocess.CompletedProcess[str]:
    own = {"VENV": str(folder), "PYTHON": str(python), "TORCH": "cpu"}
    own |= {"ASKED": str(python.with_name("asked")), "CONFIGURED": configured}
    inherited = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    return subprocess.run(
        ["bash", SCRIPT], env=inherited | own | more, capture_output=True, text=True, timeout=60
    )


def test_paths_with_spaces_are_installed_with_and_into(python: Path, tmp_path: Path) -> None:
    done = installed(python, tmp_path / "an environment")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "an environment" / "bin" / "python").exists()


def test_a_folder_with_other_files_is_not_emptied(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "letter").touch()
    refused = installed(python, folder)
    assert (refused.returncode, [*folder.iterdir()]) == (1, [folder / "letter"])
    assert f"VENV is '{folder}', which has other files" in refused.stderr


def test_an_environment_without_pip_keeps_its_packages(python: Path, tmp_path: Path) -> None:
    """As `uv venv` creates it."""
    installed(python, folder := tmp_path / "environment")
    (folder / ".weft-runtime").unlink()
    (folder / "bin" / "no pip").touch()
    done = installed(python, folder)
    assert (done.returncode, "creating" in done.stdout) == (0, False)


def test_an_environment_of_an_older_python_is_refused(python: Path, tmp_path: Path) -> None:
    installed(python, folder := tmp_path / "environment")
    (folder / ".weft-runtime").unlink()
    (folder / "bin" / "old").touch()
    refused = installed(python, folder)
    assert refused.returncode == 1
    assert f"VENV is '{folder}', whose Python is older than 3.11" in refused.stderr


def test_a_package_whose_installation_was_interrupted_is_installed_again(
    python: Path, tmp_path: Path
) -> None:
    installed(python, folder := tmp_path / "environment")
    (folder / ".weft-runtime").unlink()
    packages = folder / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info", "partial-1.dist-info"):
        (packages / name).mkdir(parents=True)
        (packages / name / "METADATA").touch()
    (packages / "whole-1.dist-info" / "INSTALLER").touch()
    assert installed(python, folder).returncode == 0
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_uv_which_does_not_read_it_is_left_out_where_pip_has_an_index_of_its_own(
    python: Path, tmp_path: Path
) -> None:
    assert installed(python, tmp_path / "environment").returncode == 0
    asked = python.with_name("asked").read_text()
    assert "requirements/runtime.lock" in asked
    assert "requirements/uv.lock" not in asked


@pytest.mark.parametrize(
    ("configured", "more", "used"),
    [
        ("global.cert='/etc/our own.pem'", {}, "/etc/our own.pem"),
        (":env:.cert='/first.pem'\nglobal.cert='/second.pem'", {}, "/first.pem"),
        ("global.cert='/pip.pem'", {"SSL_CERT_FILE": "/uv.pem"}, "/uv.pem"),
        ("global.client-cert='/client.pem'", {}, "its own certificates"),
    ],
)
def test_uv_trusts_the_certificates_that_pip_is_configured_with(
    python: Path, tmp_path: Path, configured: str, more: dict[str, str], used: str
) -> None:
    assert installed(python, tmp_path / "environment", configured, **more).returncode == 0
    asked = python.with_name("asked").read_text()
    assert {line for line in asked.splitlines() if line.startswith("uv")} == {f"uv with {used}"}
