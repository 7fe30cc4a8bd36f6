"""Measure live streams, compared with StreamDiffusion's own package if it is given.

    pip install --no-deps --target FOLDER streamdiffusion==0.1.1
    python -m benchmarks.streams --peer FOLDER

Prints Markdown tables: where the time of one stream's frame goes; one stream compared with the
peer; several streams with different settings compared with what the networks alone would allow;
streams together with ordinary requests; and what residual guidance and the similarity filter save.
The systems take turns, each row is printed as soon as it is measured, and if there are several
rounds there is a table of medians. Everything runs on the GPU if there is one; `--architecture
sd15` is a model with Stable Diffusion 1.5's sizes and random weights. Measurements for which there
is no time within the seconds of ``--within`` are left out.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from contextlib import ExitStack
from functools import cache, partial
from math import nan
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import torch
from torch.nn import functional

from benchmarks.allowance import Allowance, add_settle, add_within
from benchmarks.architectures import RANDOM, write
from benchmarks.frame_parts import BESIDE, FrameParts, watched, watched_session
from benchmarks.network_calls import call_costs, wide_group_norm
from benchmarks.peers import SETTLING_SHARE, settle
from benchmarks.real_server import SERVE, served
from benchmarks.stream_clients import StreamingWeft, jpeg
from benchmarks.stream_diffusion import StreamDiffusionPeer
from benchmarks.stream_socket import run_socket
from embedded import MODEL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.real_server import Served
    from benchmarks.stream_runs import RunResult

    Settings = Mapping[str, Any]

Name = TypeVar("Name")
Result = TypeVar("Result")

STAGES = 4

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "cfg": ({"name": "cfg", "scale": 1.5}, "full"),
    "none": ({"name": "none"}, "none"),
    "residual, self": ({"name": "cfg", "scale": 1.5, "policy": {"name": "residual"}}, "self"),
    "residual, onetime": (
        {"name": "cfg", "scale": 1.5, "policy": {"name": "residual", "mode": "onetime"}},
        "initialize",
    ),
}
"""Our guidance settings, and StreamDiffusion's names for them."""

COUNTS = (1, 2, 4, 8)

WARM_UP_S = 1.0
"""Seconds of warm-up of a system before it is timed."""

RUN_OVERHEAD_S = 2.0
"""Minimum seconds that a run takes in addition to the measured time."""

COUNTED_S = 1.0
"""Seconds of the run in which operations are counted; it is slow, and few frames suffice."""

SERVER_S = 40.0
"""Seconds in which a server starts and settles."""

FILTERED_FPS = 6
"""Frame rate of the camera for the filter's measurement, with which the engine keeps up."""


def settings(stages: int = STAGES, **fields: Any) -> dict[str, Any]:
    """Settings of an image-to-image stream with a number of stages.

    The stages are all but the first of a run, so the run starts part way.
    """
    given = {"prompt": "a red circle", "seed": 1, "sampler": "lcm", "guidance": {"name": "none"}}
    steps = stages + 1
    return {**given, "steps": steps, "strength": (stages + 0.5) / steps, **fields}


def several(count: int) -> list[Settings]:
    """Settings of streams that differ in prompt, sampler and guidance, with one row per stage."""
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
    colors = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "cyan")
    return [
        settings(prompt=f"a {colors[i]} circle", seed=i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def main() -> int:
    """Run the rounds and print the report; 1 if something failed."""
    options = _options()
    allowance = Allowance(options.within)
    for name in ("diffusers", "weft", "server"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    print(_heading(options), flush=True)
    with ExitStack() as stack:
        if options.architecture is not None:
            options.model = Path(stack.enter_context(TemporaryDirectory())) / options.architecture
            write(options.architecture, options.model, "auto", "auto")
            allowance.say("weights written")
        weft = StreamingWeft(options.model, options.row_budget)
        stack.callback(weft.stop)
        allowance.say("engine ready")
        with weft.engine.undisturbed():
            weft.run_sessions([settings()], WARM_UP_S)
        settle(weft.engine, weft.model, options.settle, allowance)
        for name in options.only or PARTS:
            PARTS[name](Turns(weft, options, allowance, stack))
        return allowance.report()


class Turns:
    """Runs systems in turns, while Weft's engine records no graphs.

    Args:
        weft: the engine with service and sessions.
        options: options of the command.
        allowance: time limit of the benchmark.
        stack: stack that closes what is started.
    """

    def __init__(
        self,
        weft: StreamingWeft,
        options: argparse.Namespace,
        allowance: Allowance,
        stack: ExitStack,
    ) -> None:
        self.weft = weft
        self.options = options
        self.allowance = allowance
        self.stack = stack

    @property
    def seconds(self) -> float:
        """Measured time of each run."""
        return self.options.seconds

    def table(
        self,
        title: str,
        head: str,
        systems: Mapping[Name, Callable[[], Result | None]],
        row: Callable[[Name, Mapping[Name, Sequence[Result]]], str | None],
    ) -> None:
        """Run all systems in turns and print a table.

        Args:
            title: title of the table.
            head: names of its columns, separated by vertical bars.
            systems: functions that run each system, by name and in decreasing order of importance;
                they return None if there was no time.
            row: makes the table's row of a system from the runs of all systems; None for no row.
        """
        runs: dict[Name, list[Result]] = {}
        rounds: int = self.options.rounds
        for number in range(1, rounds + 1):
            named = f"{title}, round {number}" if rounds > 1 else title
            _print_head(named, head)
            for name, run in systems.items():
                if not self.allowance.allows(self.seconds + RUN_OVERHEAD_S, f"{named}: {name}"):
                    continue
                with self.weft.engine.undisturbed():
                    ran = self.allowance.attempt(f"{named}: {name}", run)
                if ran is None:
                    continue
                runs.setdefault(name, []).append(ran)
                line = row(name, {one: own[-1:] for one, own in runs.items()})
                if line is not None:
                    print(line, flush=True)
        if any(len(own) > 1 for own in runs.values()):
            _print_head(f"{title}, medians", head)
            for line in (row(name, runs) for name in runs):
                if line is not None:
                    print(line, flush=True)


def _print_head(title: str, head: str) -> None:
    print(f"\n### {title}\n\n| {head} |\n|{'---|' * (head.count('|') + 1)}", flush=True)


def _one_stream(turns: Turns) -> None:
    weft, options, stream = turns.weft, turns.options, settings()
    ours = "Weft's engine"

    @cache
    def server() -> tuple[Served, list[bytes]]:
        command, threads = [*SERVE, "--model", f"model={options.model}"], str(options.threads)
        begun = turns.stack.enter_context(served(command, OMP_NUM_THREADS=threads))
        begun.settle(min(options.settle, SETTLING_SHARE * turns.allowance.left_s))
        turns.allowance.say("the server for the socket is settled")
        return begun, [jpeg(frame) for frame in weft.frames(0)]

    def socket() -> RunResult | None:
        if not server.cache_info().currsize and not turns.allowance.allows(
            SERVER_S, "a server for the socket"
        ):
            return None
        begun, files = server()
        return run_socket(begun, {"max_fps": 1000.0, **stream}, files, turns.seconds)

    systems: dict[str, Callable[[], RunResult | None]] = {
        ours: lambda: weft.run([stream], turns.seconds),
        "Weft's session*": lambda: weft.run_sessions([stream], turns.seconds)[0],
        **_peers(turns, STAGES, ("none",)),
        "Weft's socket*": socket,
    }

    def row(name: str, runs: Mapping[str, Sequence[RunResult]]) -> str:
        ran = runs[name]
        ratio = _ratio(runs[ours], ran) if ours in runs else nan
        return (
            f"| {name} | {_of(ran, 'rate'):.2f} | {ratio:.2f} x "
            f"| {1000 * _of(ran, 'middle_s'):.0f} | {1000 * _of(ran, 'late_s'):.0f} "
            f"| {_outside(ran)} |"
        )

    head = "system | frames/s | Weft's engine is | latency p50 ms | p95 ms | outside the networks"
    turns.table(f"One stream, {STAGES} stages", head, systems, row)
    print("\n\\* with JPEG files both ways", flush=True)


def _outside(ran: Sequence[RunResult]) -> str:
    """Fraction of the time in which no network worked, where that is known."""
    return f"{1 - _of(ran, 'of_limit'):.1%}" if ran[0].rows else ""


def _parts_of_a_frame(turns: Turns) -> None:
    """Print the parts of a single stream's frame, with tasks of the engine and with a session."""
    weft, options, allowance = turns.weft, turns.options, turns.allowance
    allowance.attempt("calls of the networks", partial(_print_network_calls, weft))
    for stages in (STAGES, 1):
        stream = settings(stages)
        drivers: dict[str, Callable[[float], object]] = {
            "engine": lambda seconds, stream=stream: weft.run([stream], seconds),
            "session*": lambda seconds, stream=stream: weft.run_sessions([stream], seconds),
        }
        for name, run in drivers.items():
            title = f"A frame of one stream by its parts, stages: {stages}, {name}"
            if not allowance.allows(turns.seconds + COUNTED_S + 2 * RUN_OVERHEAD_S, title):
                continue
            timed = FrameParts(synchronizes=options.synchronise)
            counted = FrameParts(counts=True)
            before = weft.engine.measurements.rows_per_tick.copy()
            with weft.engine.undisturbed():
                with watched(weft.engine, timed), watched_session(timed):
                    run(turns.seconds)
                rows = weft.engine.measurements.rows_per_tick - before
                with watched(weft.engine, counted):
                    run(COUNTED_S)
            _print_parts(title, timed, counted)
            mean = sum(n * times for n, times in rows.items()) / max(1, rows.total())
            print(f"\n{mean:.2f} rows a tick", flush=True)
    print("\n\\* with JPEG files both ways", flush=True)


def _print_network_calls(weft: StreamingWeft) -> None:
    """Print what the calls of a frame cost on their own, without replaying recordings."""
    wide = "group norms by the whole device"
    _print_head(
        "Calls of the networks, launched one by one",
        "network | launched, ms | done, ms | operations that take longest, ms",
    )
    with weft.engine.undisturbed(), torch.inference_mode():
        for name, call in weft.network_calls(STAGES).items():
            found = call_costs(call)
            longest = ", ".join(f"{op} {1000 * s:.1f}" for op, s in found.longest)
            times = f"{1000 * found.launch_s:.1f} | {1000 * found.done_s:.1f}"
            rows = f", {STAGES} rows" if name == "denoiser" else ""
            print(f"| {name}{rows} | {times} | {longest} |", flush=True)
            with patch.object(functional, "group_norm", wide_group_norm):
                found = call_costs(call)
            times = f"{1000 * found.launch_s:.1f} | {1000 * found.done_s:.1f}"
            print(f"| {name}{rows}, {wide} | {times} | |", flush=True)


def _print_parts(title: str, timed: FrameParts, counted: FrameParts) -> None:
    """Print a frame's parts, those of the engine's thread first, from the longest down."""
    _print_head(
        f"{title}: {1000 * timed.frame_s:.1f} ms",
        "part | calls a frame | ms a call, median | ms a frame | share | operations a frame "
        "| ms of the device a call",
    )
    asked = counted.operations()
    parts = sorted(timed.parts().items(), key=lambda one: (one[0] in BESIDE, -one[1].seconds))
    for name, part in parts:
        beside = name in BESIDE
        share = "beside" if beside else f"{part.seconds / timed.frame_s:.1%}"
        operations = "" if beside else f"{part.calls * asked.get(name, 0.0):.0f}"
        device = "" if part.device_s is None else f"{1000 * part.device_s:.1f}"
        print(
            f"| {name} | {part.calls:.2f} | {1000 * part.median_s:.2f} | {1000 * part.seconds:.2f} "
            f"| {share} | {operations} | {device} |",
            flush=True,
        )


def _several_streams(turns: Turns) -> None:
    weft = turns.weft
    mixes = {str(n): several(n) for n in COUNTS}
    mixes["4 equal"] = [settings(seed=i) for i in range(4)]
    heavy = settings(guidance=KINDS["cfg"][0], seed=9)
    mixes["3, one of cfg"] = [settings(seed=0), settings(seed=1), heavy]
    systems: dict[str, Callable[[], RunResult]] = {
        name: lambda mix=mix: weft.run(mix, turns.seconds) for name, mix in mixes.items()
    }
    most = max(COUNTS)
    systems[f"{most} sessions*"] = lambda: weft.run_sessions(several(most), turns.seconds)[0]

    def row(name: str, runs: Mapping[str, Sequence[RunResult]]) -> str:
        ran = runs[name]
        inside = ran[0].rows
        limit = f"{_of(ran, 'of_limit'):.2f}" if inside else ""
        device = f"{_of(ran, 'device_evenness'):.2f}" if inside else ""
        return (
            f"| {name} | {_of(ran, 'rate'):.2f} | {limit} | {_of(ran, 'frames_evenness'):.2f} "
            f"| {device} | {1000 * _of(ran, 'middle_s'):.0f} | {1000 * _of(ran, 'late_s'):.0f} |"
        )

    head = (
        "streams | frames/s | of the networks' limit | worst / best frames/s "
        "| worst / best device time | latency p50 ms | p95 ms"
    )
    turns.table("Several streams at once", head, systems, row)
    print("\n\\* with JPEG files both ways", flush=True)


def _beside_requests(turns: Turns) -> None:
    mixes = {"1": [settings()], "4": several(4)}
    systems: dict[tuple[str, bool], Callable[[], RunResult]] = {
        (name, background): lambda mix=mix, background=background: turns.weft.run(
            mix, turns.seconds, background=background
        )
        for name, mix in mixes.items()
        for background in (False, True)
    }

    def row(
        name: tuple[str, bool], runs: Mapping[tuple[str, bool], Sequence[RunResult]]
    ) -> str | None:
        streams, background = name
        if not background or (streams, False) not in runs:
            return None
        alone, beside = runs[streams, False], runs[streams, True]
        ratio = median(b.late_s / a.late_s for a, b in zip(alone, beside, strict=False))
        made = median(ran.ordinary / ran.seconds for ran in beside)
        return (
            f"| {streams} | {_of(alone, 'rate'):.2f} | {_of(beside, 'rate'):.2f} "
            f"| {1000 * _of(alone, 'late_s'):.0f} | {1000 * _of(beside, 'late_s'):.0f} "
            f"| {ratio:.2f} x | {made:.2f} |"
        )

    head = "streams | frames/s alone | beside | p95 ms alone | beside | ratio | images/s"
    turns.table("Streams beside ordinary requests of 20 steps with cfg", head, systems, row)


def _guidance(turns: Turns) -> None:
    for stages in (1, STAGES):
        theirs = _peers(turns, stages, [kind for _, kind in KINDS.values()], 0.5)
        systems: dict[str, Callable[[], RunResult]] = {}
        for name, (kind, peers_kind) in KINDS.items():
            peer = _peer_name(peers_kind)
            if peer in theirs:
                systems[peer] = theirs[peer]
            systems[name] = lambda kind=kind, stages=stages: turns.weft.run(
                [settings(stages, guidance=kind)], turns.seconds / 2
            )

        def row(name: str, runs: Mapping[str, Sequence[RunResult]]) -> str | None:
            if name not in KINDS or "cfg" not in runs:
                return None
            cells = [_beside(runs[name], runs["cfg"])]
            peer, full = _peer_name(KINDS[name][1]), _peer_name("full")
            if peer in runs and full in runs:
                cells.append(_beside(runs[peer], runs[full]))
            return f"| {name} | {' | '.join(cells)} |"

        head = "guidance | Weft, frames/s | x cfg"
        if theirs:
            head += " | StreamDiffusion, frames/s | x cfg"
        turns.table(f"Guidance of one stream, stages: {stages}", head, systems, row)


def _filter(turns: Turns) -> None:
    """Measure the work on a film that stands still half of the time, except for camera noise."""
    plain = settings(guidance=KINDS["residual, self"][0])
    streams = {"none": plain, "similarity": {**plain, "similarity_filter": {}}}

    def work(stream: Settings) -> float:
        ran, worked_s = turns.weft.run_sessions(
            [stream], 2 * turns.seconds, fps=FILTERED_FPS, pauses=True
        )
        return worked_s / ran.frames

    systems = {name: lambda stream=stream: work(stream) for name, stream in streams.items()}

    def row(name: str, runs: Mapping[str, Sequence[float]]) -> str:
        pairs = zip(runs.get("none", ()), runs[name], strict=False)
        factor = median([a / b for a, b in pairs] or [nan])
        return f"| {name} | {1000 * median(runs[name]):.1f} | {factor:.2f} x |"

    title = "Similarity filter, on a film that stands still for half of the time"
    turns.table(title, "filter | device ms a frame | saving", systems, row)


def _peers(
    turns: Turns, stages: int, kinds: Sequence[str], share: float = 1.0
) -> dict[str, Callable[[], RunResult]]:
    """StreamDiffusion with each kind of guidance; empty if no folder is given."""
    options, weft = turns.options, turns.weft
    if options.peer is None:
        return {}
    frames, seconds = weft.frames(0), share * turns.seconds

    @cache
    def warm(kind: str, *, channels_last: bool) -> StreamDiffusionPeer:
        peer = StreamDiffusionPeer(
            options.peer,
            options.model,
            side=weft.side,
            stages=stages,
            guidance=kind,
            channels_last=channels_last,
        )
        peer.run(frames, WARM_UP_S)
        return peer

    def run(kind: str, *, channels_last: bool) -> RunResult:
        return warm(kind, channels_last=channels_last).run(frames, seconds)

    systems: dict[str, Callable[[], RunResult]] = {}
    for kind in kinds:
        if len(kinds) == 1:
            systems["StreamDiffusion"] = partial(run, kind, channels_last=False)
        systems[_peer_name(kind)] = partial(run, kind, channels_last=True)
    return systems


def _peer_name(kind: str) -> str:
    return f"StreamDiffusion in channels_last, {kind}"


def _of(runs: Sequence[RunResult], figure: str) -> float:
    return median(getattr(ran, figure) for ran in runs)


def _ratio(runs: Sequence[RunResult], others: Sequence[RunResult]) -> float:
    return median(a.rate / b.rate for a, b in zip(runs, others, strict=False))


def _beside(runs: Sequence[RunResult], others: Sequence[RunResult]) -> str:
    return f"{_of(runs, 'rate'):.2f} | {_ratio(runs, others):.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder")
    parser.add_argument("--architecture", choices=RANDOM, help="of random weights, instead of it")
    parser.add_argument("--peer", type=Path, help="folder of the package streamdiffusion 0.1.1")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), help="tables to print")
    parser.add_argument(
        "--row-budget",
        type=int,
        help="most rows of a forward pass; few of them shorten the start",
    )
    parser.add_argument(
        "--synchronise",
        action="store_true",
        help="wait for a GPU after each network when a frame's parts are timed",
    )
    add_within(parser)
    add_settle(parser)
    return parser.parse_args()


def _heading(options: argparse.Namespace) -> str:
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    return (
        f"{options.architecture or options.model.name}, {device}, "
        f"{options.threads} threads, torch {torch.__version__}; {options.rounds} rounds of "
        f"{options.seconds:g} s"
    )


PARTS: dict[str, Callable[[Turns], None]] = {
    "parts": _parts_of_a_frame,
    "one": _one_stream,
    "several": _several_streams,
    "beside": _beside_requests,
    "guidance": _guidance,
    "filter": _filter,
}


if __name__ == "__main__":
    sys.exit(main())
