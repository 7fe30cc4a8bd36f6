"""The command `weft`: runs `server.cli` after a check that Weft's packages are its own.

Weft installs packages with common names that other distributions use too: `guidance` is also a
distribution on the package index. In one environment they overwrite or hide each other, and the
resulting errors name neither. This module's name is unique to Weft, so it can check.
"""

from __future__ import annotations

import sys
from base64 import urlsafe_b64encode
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PACKAGES: Final = ("samplers", "guidance", "server", "embedded")
HOME: Final = Path(__file__).resolve().parent


def main() -> None:
    """Run the command line, or exit with the reason why Weft's packages cannot be used."""
    if refusal := clash():
        sys.exit(f"weft: {refusal}")
    from server.cli import main as command

    command()


def clash() -> str | None:
    """Find a package of Weft that another distribution replaces or hides.

    Returns:
        A sentence that names the package and the distribution, if known, or None if all packages
        are Weft's own.
    """
    for name in PACKAGES:
        folder = _imported_from(name)
        if folder is None:
            return (
                f"Weft's package `{name}` is no longer in {HOME}; pip removes it with another "
                "distribution that has one of that name. Install Weft again, into an environment "
                "of its own."
            )
        if folder != HOME / name:
            owner = _owner_of(name)
            return (
                f"Python imports the package `{name}` from {folder}"
                f"{f', which belongs to the distribution {owner}' if owner else ''}, and not from "
                f"Weft's own {HOME / name}. Install Weft into an environment of its own."
            )
        # Checked first, since reading the records of all distributions takes as long as the rest of
        # the start-up.
        if _looks_strange(name) and (owner := _owner_of(name)):
            return (
                f"the distribution {owner} and Weft have both installed a package `{name}` into "
                f"{folder}, so that one has overwritten the other. Install Weft into an "
                "environment of its own."
            )
    return None


def _imported_from(name: str) -> Path | None:
    """Return the folder of a package without importing it; None if there is none."""
    spec = find_spec(name)
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def _looks_strange(name: str) -> bool:
    """Return whether a package differs from the wheel's; False in a checkout, which has no list."""
    for record in HOME.glob("weft-*.dist-info/RECORD"):
        rows = (line.split(",") for line in record.read_text("utf-8").splitlines())
        hashes = {row[0]: row[1] for row in rows if row[0].startswith(f"{name}/")}
        known = {path.split("/")[1] for path in hashes} | {"__pycache__"}
        first = (HOME / name / "__init__.py").read_bytes()
        digest = urlsafe_b64encode(sha256(first).digest()).decode().rstrip("=")
        if hashes[f"{name}/__init__.py"] != f"sha256={digest}":
            return True
        if any(entry.name not in known for entry in (HOME / name).iterdir()):
            return True
    return False


def _owner_of(name: str) -> str | None:
    """Return the other distribution that installed a package of that name, with its version."""
    from importlib.metadata import distributions

    for one in distributions():
        installed = (one.read_text("RECORD") or "").splitlines()
        if one.name != "weft" and any(path.startswith(f"{name}/") for path in installed):
            return f"{one.name} {one.version}"
    return None


if __name__ == "__main__":
    main()
