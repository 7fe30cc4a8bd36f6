"""Measure live streams, beside StreamDiffusion's own package if it is given.

    pip install --no-deps --target FOLDER streamdiffusion==0.1.1
    python -m benchmarks.streams --peer FOLDER

Prints Markdown tables: one stream beside the peer, several streams of different settings beside
what the networks alone would allow, streams beside ordinary requests, and what residual guidance
and the similarity filter save. Each figure is the median over rounds, in which the systems take
turns. Everything runs on the GPU if there is one; `--architecture sd15` is a model of Stable
Diffusion 1.5's sizes with random weights.
"""

from __future__ import annotations

import argparse
import logging
import platform
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.architectures import RANDOM, write
from benchmarks.real_server import SERVE, served
from benchmarks.stream_clients import StreamingWeft, jpeg
from benchmarks.stream_diffusion import StreamDiffusionPeer
from benchmarks.stream_socket import run_socket
from embedded import MODEL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.stream_runs import Ran

    Settings = Mapping[str, Any]

STAGES = 4

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"name": "none"}, "none"),
    "residual, self": ({"name": "cfg", "scale": 1.5, "policy": {"name": "residual"}}, "self"),
    "residual, onetime": (
        {"name": "cfg", "scale": 1.5, "policy": {"name": "residual", "mode": "onetime"}},
        "initialize",
    ),
    "cfg": ({"name": "cfg", "scale": 1.5}, "full"),
}
"""Guidance of ours, and what StreamDiffusion calls it."""

COUNTS = (1, 2, 4, 8)

FILTERED_FPS = 6
"""Pace of the camera that the filter is tried on, which the engine keeps up with."""


def settings(stages: int = STAGES, **fields: Any) -> dict[str, Any]:
    """Settings of a stream that makes an image from an image in so many stages.

    They are all but the first of a run, so that it starts part way.
    """
    given = {"prompt": "a red circle", "seed": 1, "sampler": "lcm", "guidance": {"name": "none"}}
    steps = stages + 1
    return {**given, "steps": steps, "strength": (stages + 0.5) / steps, **fields}


def several(count: int) -> list[Settings]:
    """Streams that differ in prompt, sampler and guidance, and need a row for each stage."""
    residual = {"policy": {"name": "residual"}}
    kinds: list[dict[str, Any]] = [
        {"sampler": "lcm", "guidance": {"name": "none"}},
        {"sampler": "euler", "guidance": {"name": "cfg", "scale": 2.0, **residual}},
        {"sampler": "tcd", "guidance": {"name": "none"}},
        {"sampler": "dpm_solver_pp", "guidance": {"name": "apg", "scale": 3.0, **residual}},
        {"sampler": "ddim", "guidance": {"name": "cfg", "scale": 1.5, **residual}},
        {"sampler": "unipc", "guidance": {"name": "none"}},
        {"sampler": "euler_ancestral", "guidance": {"name": "cfg", "scale": 2.5, **residual}},
        {"sampler": "lcm", "guidance": {"name": "apg", "scale": 2.0, **residual}},
    ]
    colours = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "cyan")
    return [
        settings(prompt=f"a {colours[i]} circle", seed=i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def main() -> None:
    """Run the rounds and print the report."""
    options = _options()
    for name in ("diffusers", "weft", "server"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    print(_heading(options))
    with TemporaryDirectory() as temporary:
        if options.architecture is not None:
            options.model = Path(temporary) / options.architecture
            write(options.architecture, options.model, "auto", "auto")
        weft = StreamingWeft(options.model)
        for name in options.only or PARTS:
            PARTS[name](weft, options)
        weft.stop()


def _one_stream(weft: StreamingWeft, options: argparse.Namespace) -> None:
    stream = settings()
    files = [jpeg(frame) for frame in weft.frames(0)]
    command, threads = [*SERVE, "--model", f"model={options.model}"], str(options.threads)
    with served(command, OMP_NUM_THREADS=threads) as server:
        systems: dict[str, Callable[[], Ran]] = {
            "Weft's engine": lambda: weft.run([stream], options.seconds),
            "Weft's session*": lambda: weft.run_sessions([stream], options.seconds)[0],
            "Weft's socket*": lambda: run_socket(
                server, {"max_fps": 1000.0, **stream}, files, options.seconds
            ),
            **_peers(weft, options, STAGES, ("none",)),
        }
        runs = _rounds(systems, options.rounds)
    ours = runs["Weft's engine"]
    print(f"\n### One stream, {STAGES} stages\n")
    print("| system | frames/s | Weft's engine is | latency p50 ms | p95 ms |")
    print("|---|---|---|---|---|")
    for name, ran in runs.items():
        ratio = median(a.rate / b.rate for a, b in zip(ours, ran, strict=True))
        print(
            f"| {name} | {_of(ran, 'rate'):.2f} | {ratio:.2f} x "
            f"| {1000 * _of(ran, 'middle_s'):.0f} | {1000 * _of(ran, 'late_s'):.0f} |"
        )
    rest = 1 - _of(ours, "of_limit")
    print(f"\n\\* with JPEG files both ways. Outside the networks Weft's engine is {rest:.1%}.")


def _several_streams(weft: StreamingWeft, options: argparse.Namespace) -> None:
    mixes = {str(n): several(n) for n in COUNTS}
    mixes["4 equal"] = [settings(seed=i) for i in range(4)]
    heavy = settings(guidance=KINDS["cfg"][0], seed=9)
    mixes["3, one of cfg"] = [settings(seed=0), settings(seed=1), heavy]
    systems: dict[str, Callable[[], Ran]] = {
        name: lambda mix=mix: weft.run(mix, options.seconds) for name, mix in mixes.items()
    }
    most = max(COUNTS)
    systems[f"{most} sessions*"] = lambda: weft.run_sessions(several(most), options.seconds)[0]
    runs = _rounds(systems, options.rounds)
    print("\n### Several streams at once\n")
    print(
        "| streams | frames/s | of the networks' limit | worst / best frames/s "
        "| worst / best device time | latency p50 ms | p95 ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, ran in runs.items():
        inside = ran[0].rows
        limit = f"{_of(ran, 'of_limit'):.2f}" if inside else ""
        device = f"{_of(ran, 'device_evenness'):.2f}" if inside else ""
        print(
            f"| {name} | {_of(ran, 'rate'):.2f} | {limit} | {_of(ran, 'frames_evenness'):.2f} "
            f"| {device} | {1000 * _of(ran, 'middle_s'):.0f} | {1000 * _of(ran, 'late_s'):.0f} |"
        )
    print("\n\\* with JPEG files both ways")


def _beside_requests(weft: StreamingWeft, options: argparse.Namespace) -> None:
    mixes = {"1": [settings()], "4": several(4)}
    systems = {
        (name, background): lambda mix=mix, background=background: weft.run(
            mix, options.seconds, background=background
        )
        for name, mix in mixes.items()
        for background in (False, True)
    }
    runs = _rounds(systems, options.rounds)
    print("\n### Streams beside ordinary requests of 20 steps with cfg\n")
    print("| streams | frames/s alone | beside | p95 ms alone | beside | ratio | images/s |")
    print("|---|---|---|---|---|---|---|")
    for name in mixes:
        alone, beside = runs[name, False], runs[name, True]
        ratio = median(b.late_s / a.late_s for a, b in zip(alone, beside, strict=True))
        made = median(ran.ordinary / ran.seconds for ran in beside)
        print(
            f"| {name} | {_of(alone, 'rate'):.2f} | {_of(beside, 'rate'):.2f} "
            f"| {1000 * _of(alone, 'late_s'):.0f} | {1000 * _of(beside, 'late_s'):.0f} "
            f"| {ratio:.2f} x | {made:.2f} |"
        )


def _guidance(weft: StreamingWeft, options: argparse.Namespace) -> None:
    for stages in (1, STAGES):
        ours: dict[str, Callable[[], Ran]] = {
            name: lambda kind=kind, stages=stages: weft.run(
                [settings(stages, guidance=kind)], options.seconds / 2
            )
            for name, (kind, _) in KINDS.items()
        }
        theirs = _peers(weft, options, stages, [kind for _, kind in KINDS.values()], 0.5)
        runs = _rounds({**ours, **theirs}, options.rounds)
        print(f"\n### Guidance of one stream, stages: {stages}\n")
        print("| guidance | Weft, frames/s | x cfg | StreamDiffusion, frames/s | x cfg |")
        print("|---|---|---|---|---|")
        for name, (_, kind) in KINDS.items():
            cells = [_beside(runs[name], runs["cfg"])]
            if theirs:
                cells.append(_beside(runs[_peer_name(kind)], runs[_peer_name("full")]))
            print(f"| {name} | {' | '.join(cells)} |")


def _filter(weft: StreamingWeft, options: argparse.Namespace) -> None:
    """Seconds of work on a film whose second half stands still, but for the camera's noise."""
    plain = settings(guidance=KINDS["residual, self"][0])
    streams = {"none": plain, "similarity": {**plain, "similarity_filter": {}}}
    work: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(options.rounds):
        for name, stream in streams.items():
            about = weft.run_sessions([stream], 2 * options.seconds, fps=FILTERED_FPS, pauses=True)
            work[name].append(about[1] / about[0].frames)
    saved = median(a / b for a, b in zip(work["none"], work["similarity"], strict=True))
    print("\n### Similarity filter, on a film that stands still for half of the time\n")
    print("| filter | device ms a frame | saving |")
    print("|---|---|---|")
    for name, seconds in work.items():
        factor = saved if name == "similarity" else 1.0
        print(f"| {name} | {1000 * median(seconds):.1f} | {factor:.2f} x |")


def _peers(
    weft: StreamingWeft,
    options: argparse.Namespace,
    stages: int,
    kinds: Sequence[str],
    share: float = 1.0,
) -> dict[str, Callable[[], Ran]]:
    """StreamDiffusion at each kind of guidance; none of it where no folder is given."""
    if options.peer is None:
        return {}
    frames, seconds = weft.frames(0), share * options.seconds
    systems: dict[str, Callable[[], Ran]] = {}
    for kind in kinds:
        for channels_last in (False, True) if len(kinds) == 1 else (True,):
            peer = StreamDiffusionPeer(
                options.peer,
                options.model,
                side=weft.side,
                stages=stages,
                guidance=kind,
                channels_last=channels_last,
            )
            name = _peer_name(kind) if channels_last else "StreamDiffusion"
            systems[name] = lambda peer=peer: peer.run(frames, seconds)
    return systems


def _peer_name(kind: str) -> str:
    return f"StreamDiffusion in channels_last, {kind}"


def _rounds(systems: Mapping[Any, Callable[[], Ran]], rounds: int) -> dict[Any, list[Ran]]:
    runs: dict[Any, list[Ran]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            runs[name].append(run())
    return runs


def _of(runs: Sequence[Ran], figure: str) -> float:
    return median(getattr(ran, figure) for ran in runs)


def _beside(runs: Sequence[Ran], others: Sequence[Ran]) -> str:
    ratio = median(a.rate / b.rate for a, b in zip(runs, others, strict=True))
    return f"{_of(runs, 'rate'):.2f} | {ratio:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder")
    parser.add_argument("--architecture", choices=RANDOM, help="of random weights, instead of it")
    parser.add_argument("--peer", type=Path, help="folder of the package streamdiffusion 0.1.1")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), help="tables to print")
    return parser.parse_args()


def _heading(options: argparse.Namespace) -> str:
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    return (
        f"{options.architecture or options.model.name}, {device}, "
        f"{options.threads} threads, torch {torch.__version__}; {options.rounds} rounds of "
        f"{options.seconds:g} s"
    )


PARTS: dict[str, Callable[[StreamingWeft, argparse.Namespace], None]] = {
    "one": _one_stream,
    "several": _several_streams,
    "beside": _beside_requests,
    "guidance": _guidance,
    "filter": _filter,
}


if __name__ == "__main__":
    main()
