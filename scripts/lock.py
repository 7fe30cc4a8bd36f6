"""Resolves the dependencies of pyproject.toml and writes the lock files.

`make lock` runs it with uv at hand. Versions already in constraints.txt are kept unless
`--upgrade` is given. It writes:

- `requirements/runtime.lock`: what the server needs besides torch, with durable jobs, with hashes;
- `requirements/dev.lock`: the same and the tools of `make test`, with hashes;
- `requirements/torch.lock`: PyPI's build of torch and the CUDA packages it brings, with hashes.
- `requirements/torch-cpu.lock`: the CPU builds for Linux, from PyTorch's own index, with hashes;
- `requirements/uv.lock`: the program that installs all of these, with hashes;
- `constraints.txt`: the version of everything above, for `pip install --constraint`.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_LOCK = ROOT / "requirements/torch-cpu.lock"
UV_LOCK = ROOT / "requirements/uv.lock"
TORCH_AND_CUDA = re.compile(r"torch==|triton==|nvidia-|cuda-")
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
CPU_WHEELS = (
    r"torch-{version}%2Bcpu-cp31[1-4]-cp31[1-4]-manylinux[^#\"]*\.whl#sha256=([0-9a-f]{{64}})"
)
SERVED = ["jobs", "postgresql"]
"""Extras that every environment created by `make setup` includes."""
HEADER = "# Written by `make lock` from pyproject.toml. Do not edit.\n"


COMPILE = (
    *("uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"),
    *("--no-header", "--no-annotate", "--python-version", "3.11"),
)


def resolve(extras: list[str], upgrade: bool) -> list[str]:
    """Returns the resolved requirements, each as a block of one pin and the hashes of its files."""
    build_requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.txt")
        kept.write_text("" if upgrade or not CONSTRAINTS.exists() else CONSTRAINTS.read_text())
        # The build tools are locked too, so that the project installs without fetching any.
        build = Path(folder, "build.in")
        build.write_text("\n".join(build_requirements["requires"]))
        command = [*COMPILE, "--constraint", str(kept)]
        for extra in extras:
            command += ["--extra", extra]
        command += ["pyproject.toml", str(build)]
        resolved = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return re.findall(r"^\S.*(?:\n .*)*", resolved.stdout, flags=re.MULTILINE)


def lock_cpu_builds() -> None:
    """Writes the lock file of torch's CPU build for Linux, unless it already has this version."""
    (version,) = re.findall(r"^torch==(\S+)", CONSTRAINTS.read_text(), flags=re.MULTILINE)
    if CPU_LOCK.exists() and f"torch=={version}+cpu " in CPU_LOCK.read_text():
        return
    with urlopen(CPU_INDEX, timeout=60) as page:
        hashes = re.findall(CPU_WHEELS.format(version=re.escape(version)), page.read().decode())
    if not hashes:
        raise SystemExit(
            f"{CPU_INDEX} lists no torch {version} for the CPU and Python 3.11 to 3.14."
        )
    lines = [f"torch=={version}+cpu", *(f"    --hash=sha256:{value}" for value in sorted(hashes))]
    write(CPU_LOCK, [" \\\n".join(lines)])


def lock_uv(upgrade: bool) -> None:
    """Writes the lock file of uv, keeping the locked version unless upgrading."""
    (locked,) = re.findall(r"^uv==\S+", UV_LOCK.read_text(), flags=re.MULTILINE)
    wanted = "uv" if upgrade else locked
    resolved = subprocess.run(
        [*COMPILE, "-"], input=wanted, check=True, stdout=subprocess.PIPE, text=True
    )
    write(UV_LOCK, [resolved.stdout.rstrip()])


def write(path: Path, lines: list[str]) -> None:
    """Writes a requirements file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER + "\n".join(lines) + "\n")


def main() -> None:
    """Writes all lock files."""
    parser = argparse.ArgumentParser(description="Resolve and lock the dependencies.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade

    dev = resolve([*SERVED, "dev"], upgrade)
    write(CONSTRAINTS, [block.split(" \\\n")[0] for block in dev])
    # The second resolution keeps the versions that the first has just written.
    runtime = resolve(SERVED, upgrade=False)
    write(ROOT / "requirements/torch.lock", [b for b in runtime if TORCH_AND_CUDA.match(b)])
    lock_cpu_builds()
    lock_uv(upgrade)
    write(ROOT / "requirements/runtime.lock", [b for b in runtime if not TORCH_AND_CUDA.match(b)])
    write(ROOT / "requirements/dev.lock", [b for b in dev if not TORCH_AND_CUDA.match(b)])


if __name__ == "__main__":
    main()
