"""Resolves the dependencies of pyproject.toml and writes the lock files.

`make lock` runs it with uv at hand. Versions already in constraints.txt are kept unless
`--upgrade` is given. It writes:

- `requirements/runtime.lock`: what the server needs besides torch, with hashes;
- `requirements/dev.lock`: the same and the tools of `make test`, with hashes;
- `requirements/torch.lock`: PyPI's build of torch and the CUDA packages it brings, with hashes.
  The CPU builds for Linux come from PyTorch's own index and are pinned by version alone;
- `constraints.txt`: the version of everything above, for `pip install --constraint`.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_AND_CUDA = re.compile(r"torch==|triton==|nvidia-|cuda-")
HEADER = "# Written by `make lock` from pyproject.toml. Do not edit.\n"


def resolve(extras: list[str], upgrade: bool) -> list[str]:
    """Returns the resolved requirements, each a block of one pin and the hashes of its files."""
    build_requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.txt")
        kept.write_text("" if upgrade or not CONSTRAINTS.exists() else CONSTRAINTS.read_text())
        # The build tools are locked too, so that the project installs without fetching any.
        build = Path(folder, "build.in")
        build.write_text("\n".join(build_requirements["requires"]))
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--python-version", "3.11"]
        command += ["--constraint", str(kept)]
        for extra in extras:
            command += ["--extra", extra]
        command += ["pyproject.toml", str(build)]
        resolved = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return re.findall(r"^\S.*(?:\n .*)*", resolved.stdout, flags=re.MULTILINE)


def write(path: Path, lines: list[str]) -> None:
    """Writes a requirements file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER + "\n".join(lines) + "\n")


def main() -> None:
    """Writes all lock files."""
    parser = argparse.ArgumentParser(description="Resolve and lock the dependencies.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade

    dev = resolve(["dev"], upgrade)
    write(CONSTRAINTS, [block.split(" \\\n")[0] for block in dev])
    # The second resolution keeps to the versions that the first has just written.
    runtime = resolve([], upgrade=False)
    write(ROOT / "requirements/torch.lock", [b for b in runtime if TORCH_AND_CUDA.match(b)])
    write(ROOT / "requirements/runtime.lock", [b for b in runtime if not TORCH_AND_CUDA.match(b)])
    write(ROOT / "requirements/dev.lock", [b for b in dev if not TORCH_AND_CUDA.match(b)])


if __name__ == "__main__":
    main()
