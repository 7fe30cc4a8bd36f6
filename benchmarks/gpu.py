"""Run all GPU measurements, part by part, into one folder.

    python -m benchmarks.gpu --folder docs/gpu/h100
    python -m benchmarks.gpu --folder FOLDER --only tests at-once-sd15=90 --seconds 300
    python -m benchmarks.gpu --folder FOLDER --rehearse     # CPU, tiny sizes

Each part is a separate command. Its output is written to ``PART.md`` with the command, the device
and the versions; if the part was cut off or failed, the file holds the output so far and says so.
The whole output and the times are stored in ``PART.json``, and the output is also shown while the
part runs. A part that has succeeded is not run again, so an interrupted measurement can be
continued. Parts are in decreasing order of importance, and all that run by default take 25 minutes;
a few more run only if ``--only`` names them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shutil import which
from subprocess import PIPE, Popen, TimeoutExpired, run
from threading import Thread
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CUT_OFF", "PARTS", "Part", "main", "run_shown"]

PACKAGES = ("torch", "diffusers", "transformers")

GPUS = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")

CUT_OFF = 124
"""Exit status of a part that took too long."""


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement.

    Attributes:
        title: title of its table.
        command: arguments of Python.
        rehearsal: the same at sizes that a CPU runs in seconds.
        seconds: time limit.
        by_name: whether it runs only if it is named.
        within: whether it accepts its time limit as an option and ends in time with what it has.
    """

    title: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    seconds: int
    by_name: bool = False
    within: bool = False


ENDING_S = 5
"""Seconds before its limit at which a part should end by itself, if it can."""


WITHIN = tuple(
    f"benchmarks.{name}"
    for name in ("at_once", "compiled_blocks", "streams", "throughput", "tick_costs")
)
"""Benchmarks that accept a time limit and measure what they can within it."""


def _measured(module: str, full: str, tiny: str) -> dict[str, Any]:
    return {
        "command": ("-m", module, *full.split()),
        "rehearsal": ("-m", module, *tiny.split(), "--threads", "1"),
        "within": module in WITHIN,
    }


def _tested(*files: str) -> tuple[str, ...]:
    # Prints each test as soon as it is done, and the slowest ones at the end.
    return ("-m", "pytest", "-v", "-m", "cuda", "--durations", "10", *files)


TIME_LIMIT_S = 1500
"""Time limit for all parts that run by default."""

RECORDINGS = "tests/server/engine/test_cuda_recordings.py"
LOST_DEVICE = "tests/server/test_lost_device.py"

CUDA_TESTS = (
    "tests/benchmarks/test_peers.py",
    "tests/embedded/test_training.py",
    "tests/server/engine/test_cuda.py",
    "tests/server/engine/test_cuda_captures.py",
    RECORDINGS,
    "tests/server/models/gguf/test_blocks.py",
    LOST_DEVICE,
)
"""Listed by name, as collecting all files takes half a minute and needs the extras."""

FEW = "--counts 1 2 --batches 1 --images 1 --rounds 1"
ONE_RUN = "--rounds 1 --requests 3 --steps 4"
TINY_PROGRAMS = "--architecture tiny_z_image --rows 1 2 --rounds 1"
"""An architecture with few blocks, as compiling each takes a C++ compiler longer than all other
parts of a rehearsal."""

PROGRAMS = "out/programs"
"""Folder for compiled programs, which later parts and later runs reuse."""

PARTS: Mapping[str, Part] = {
    "tests": Part(
        "Tests that need CUDA",
        _tested(*(file for file in CUDA_TESTS if file != LOST_DEVICE)),
        _tested(CUDA_TESTS[0]),
        seconds=100,
    ),
    "lost-device": Part(
        "A server whose GPU is lost", _tested(LOST_DEVICE), _tested(LOST_DEVICE), seconds=45
    ),
    "at-once-sd15": Part(
        "Stable Diffusion 1.5's sizes, 512 pixels, 20 steps with cfg",
        **_measured(
            "benchmarks.at_once",
            "--architecture sd15 --counts 8 1 4 16 --batches 1 8 --images 3",
            f"--steps 2 {FEW}",
        ),
        seconds=110,
    ),
    "frame-parts-sd15": Part(
        "Where the time of one live stream's frame goes, Stable Diffusion 1.5's sizes",
        **_measured(
            "benchmarks.streams",
            "--architecture sd15 --only parts --seconds 2 --rounds 1 --row-budget 8 --threads 8",
            "--only parts --seconds 1 --rounds 1 --settle 1",
        ),
        seconds=60,
    ),
    "streams-sd15": Part(
        "Several live streams, Stable Diffusion 1.5's sizes, 4 stages",
        **_measured(
            "benchmarks.streams",
            "--architecture sd15 --only several --rounds 1 --seconds 2 --threads 8",
            "--only one --seconds 2 --rounds 1",
        ),
        seconds=130,
    ),
    "at-once-sdxl": Part(
        "Stable Diffusion XL's sizes, 1024 pixels, 20 steps with cfg",
        **_measured(
            "benchmarks.at_once",
            "--architecture sdxl --counts 8 1 4 --batches 1 4 --images 1 --rounds 1 --settle 15",
            f"--architecture tiny_sdxl --steps 2 {FEW}",
        ),
        seconds=130,
    ),
    "at-once-z-image": Part(
        "Z-Image Turbo's sizes, 1024 pixels, 8 steps without guidance",
        **_measured(
            "benchmarks.at_once",
            "--architecture z_image --steps 8 --scale 0 --counts 4 1 8 2 --batches 1 4 --rounds 1",
            f"--architecture tiny_z_image --steps 2 --scale 0 {FEW}",
        ),
        seconds=130,
    ),
    "mixed-sd15": Part(
        "Mixed traffic, Stable Diffusion 1.5's sizes",
        **_measured(
            "benchmarks.throughput",
            "--architecture sd15 --requests 24 --rounds 1 --settle 15",
            ONE_RUN,
        ),
        seconds=120,
    ),
    "tick-costs-sd15": Part(
        "Plans and guidance beside the denoiser, Stable Diffusion 1.5's sizes",
        **_measured("benchmarks.tick_costs", "--architecture sd15", "--steps 5 --rows 1 8"),
        seconds=100,
    ),
    "at-once-sd15-4-steps": Part(
        "Stable Diffusion 1.5's sizes, 512 pixels, 4 steps without guidance",
        **_measured(
            "benchmarks.at_once",
            "--architecture sd15 --steps 4 --scale 0 --counts 8 1 4 16 --batches 1 8 --images 4",
            f"--steps 2 --scale 0 {FEW}",
        ),
        seconds=80,
    ),
    "mixed-sizes-z-image": Part(
        "Pictures of several sizes in one forward, Z-Image Turbo's sizes",
        **_measured(
            "benchmarks.mixed_sizes",
            "--architecture z_image --counts 4 --images 1 --rounds 2",
            "--steps 2 --counts 2 --images 1 --rounds 1",
        ),
        seconds=80,
    ),
    "adapters-sd15": Part(
        "Adapters, Stable Diffusion 1.5's sizes",
        **_measured("benchmarks.adapters", "--architecture sd15 --rounds 9", "--rounds 1"),
        seconds=60,
    ),
    "deterministic-sd15": Part(
        "What bit-identical images cost, Stable Diffusion 1.5's sizes",
        **_measured(
            "benchmarks.deterministic",
            "--architecture sd15",
            "--counts 1 2 --steps 2 --images 1 --rounds 1",
        ),
        seconds=80,
    ),
    "compiled-blocks-sd15": Part(
        "Compiled blocks and CUDA graphs, Stable Diffusion 1.5's sizes",
        **_measured(
            "benchmarks.compiled_blocks",
            f"--architecture sd15 --folder {PROGRAMS}",
            TINY_PROGRAMS,
        ),
        seconds=135,
    ),
    "at-once-sd15-compiled": Part(
        "Stable Diffusion 1.5's sizes with compiled blocks",
        **_measured(
            "benchmarks.at_once",
            "--architecture sd15 --counts 1 8 --batches 1 --rounds 1 --compile --wait 60 "
            f"--programs {PROGRAMS}",
            f"--architecture tiny_z_image --steps 2 --scale 0 --compile {FEW}",
        ),
        seconds=140,
    ),
    "frame-parts-sd15-taesd": Part(
        "Where the time of one live stream's frame goes, with TAESD's sizes",
        **_measured(
            "benchmarks.streams",
            "--architecture sd15_taesd --only parts --seconds 2 --rounds 1 --row-budget 8 "
            "--threads 8",
            "--only parts --seconds 1 --rounds 1 --settle 1",
        ),
        seconds=60,
        by_name=True,
    ),
    "tests-recordings": Part(
        "Tests of forwards that are recorded as CUDA graphs",
        _tested(RECORDINGS, CUDA_TESTS[0]),
        _tested(RECORDINGS, CUDA_TESTS[0]),
        seconds=60,
        by_name=True,
    ),
    "homogeneous-sd15": Part(
        "Homogeneous traffic, Stable Diffusion 1.5's sizes",
        **_measured(
            "benchmarks.throughput",
            "--architecture sd15 --requests 64 --rounds 2 --mix homogeneous",
            "--architecture tiny_sdxl --requests 2 --rounds 1 --mix homogeneous",
        ),
        seconds=240,
        by_name=True,
    ),
    "mixed-sdxl": Part(
        "Mixed traffic, Stable Diffusion XL's sizes",
        **_measured(
            "benchmarks.throughput",
            "--architecture sdxl --requests 12 --rounds 1 --steps 20",
            f"--architecture tiny_sdxl {ONE_RUN}",
        ),
        seconds=240,
        by_name=True,
    ),
    "first-forwards-sd15": Part(
        "First calls of their size after warming up, Stable Diffusion 1.5's sizes",
        **_measured("benchmarks.first_forwards", "--architecture sd15", ""),
        seconds=240,
        by_name=True,
    ),
    "compiled-blocks-sdxl": Part(
        "Compiled blocks and CUDA graphs, Stable Diffusion XL's sizes",
        **_measured(
            "benchmarks.compiled_blocks",
            f"--architecture sdxl --folder {PROGRAMS}",
            TINY_PROGRAMS,
        ),
        seconds=540,
        by_name=True,
    ),
}


def main() -> int:
    """Run the parts that are not done; 1 if one of them failed."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    began, failed = monotonic(), False
    unnamed = [name for name, part in PARTS.items() if not part.by_name]
    chosen = options.only or [(name, PARTS[name].seconds) for name in unnamed]
    for name, max_s in chosen:
        record = options.folder / f"{name}.json"
        if record.exists() and json.loads(record.read_text())["code"] == 0:
            print(f"{name}: done before", flush=True)
            continue
        left = min(max_s, options.seconds - (monotonic() - began))
        if left < 1:
            print(f"{name}: no time left", flush=True)
            failed = True
            continue
        done = _run(name, options, left)
        record.write_text(json.dumps(done, indent=1) + "\n")
        failed |= done["code"] != 0
        print(f"{name}: {'done' if done['code'] == 0 else 'failed'}", flush=True)
    _write_index(options.folder)
    return int(failed)


def _run(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    part = PARTS[name]
    arguments = part.rehearsal if options.rehearse else part.command
    if part.within:
        arguments = (*arguments, "--within", f"{max(1, limit_s - ENDING_S):.0f}")
    print(f"{name}: at most {limit_s:.0f} s", flush=True)
    began = monotonic()
    code, out, err = run_shown([sys.executable, "-u", *arguments], limit_s)
    record = {
        "title": part.title,
        "command": " ".join(("python", *arguments)),
        "code": code,
        "seconds": round(monotonic() - began, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "device": _device(),
        "versions": {package: version(package) for package in PACKAGES},
        "stdout": out,
        "stderr": err,
    }
    if out.strip():
        (options.folder / f"{name}.md").write_text(_document(record))
    return record


def run_shown(command: Sequence[str], limit_s: float) -> tuple[int, str, str]:
    """Run a command, show its output, and kill it with all its children when the time is over.

    Args:
        command: program and its arguments.
        limit_s: time limit in seconds.

    Returns:
        Its exit status, or `CUT_OFF`, and its standard output and error.
    """
    kept: tuple[list[str], list[str]] = ([], [])
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
        shown = (process.stdout, sys.stdout), (process.stderr, sys.stderr)
        readers = [
            Thread(target=_show, args=(written, screen, lines))
            for (written, screen), lines in zip(shown, kept, strict=True)
        ]
        for reader in readers:
            reader.start()
        try:
            code = process.wait(limit_s)
        except TimeoutExpired:
            code = CUT_OFF
        finally:
            # Processes that it started are in its group, too, and may keep its output open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for reader in readers:
                reader.join()
    out, err = ("".join(lines) for lines in kept)
    return code, out, err


def _show(written: IO[str] | None, screen: TextIO, lines: list[str]) -> None:
    for line in written or ():
        lines.append(line)
        screen.write(line)
        screen.flush()


def _document(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    ended = {0: "", CUT_OFF: " It was cut off there, and this is what it had by then."}
    failed = f" It failed then, with status {record['code']}."
    return (
        f"# {record['title']}\n\n    {record['command']}\n\n"
        f"{record['device']}, {versions}; {record['date']}, {record['seconds']:g} s."
        f"{ended.get(record['code'], failed)}\n\n{record['stdout'].strip()}\n"
    )


def _write_index(folder: Path) -> None:
    """Write an index of what was measured, what failed and what was not run."""
    lines = ["# Measured", "", "| part | | command |", "|---|---|---|"]
    for name, part in PARTS.items():
        file = folder / f"{name}.json"
        record = json.loads(file.read_text()) if file.exists() else None
        if record is None:
            lines.append(f"| {part.title} | not measured | |")
        elif record["code"]:
            ended = "cut off" if record["code"] == CUT_OFF else "failed"
            written = (folder / f"{name}.md").exists()
            title = f"[{part.title}]({name}.md)" if written else part.title
            lines.append(f"| {title} | {ended} | `{record['command']}` |")
        else:
            lines.append(
                f"| [{part.title}]({name}.md) | {record['date']} | `{record['command']}` |"
            )
    (folder / "index.md").write_text("\n".join(lines) + "\n")


def _device() -> str:
    if which(GPUS[0]):
        # Without torch, whose import would take seconds of the limited device time.
        names = run(GPUS, capture_output=True, text=True, check=False).stdout.splitlines()
        if names:
            return names[0]
    return f"{platform.processor() or platform.machine()} (no GPU: a rehearsal)"


def _chosen(given: str) -> tuple[str, float]:
    """Parse the name of a part and its time limit in seconds."""
    name, _, seconds = given.partition("=")
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{name!r} is no part; there are {', '.join(PARTS)}")
    return name, float(seconds) if seconds else PARTS[name].seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--folder", type=Path, required=True, help="for tables and records")
    parser.add_argument(
        "--only",
        nargs="+",
        type=_chosen,
        help="parts to run, in this order, each with =SECONDS if it may take others than its own",
    )
    parser.add_argument("--seconds", type=float, default=float(TIME_LIMIT_S), help="in all")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
