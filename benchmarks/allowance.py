"""The time limit of a benchmark, and its progress messages."""

from __future__ import annotations

import os
import sys
import time
import traceback
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

Result = TypeVar("Result")

__all__ = ["Allowance", "add_settle", "add_within"]

MAX_IMPORTS_S: Final = 300.0


def _age_s() -> float:
    """Seconds since this process started, including its imports; 0 if the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    # Some containers have a clock of their own, to which these process times do not refer.
    return age_s if 0 <= age_s < MAX_IMPORTS_S else 0.0


BEGAN: Final = perf_counter() - _age_s()


class Allowance:
    """The time limit of the process, counted from its start, including all imports.

    It reports progress on standard error, each line with the seconds since that start.

    Args:
        seconds: time limit; unlimited by default.

    Attributes:
        left_out: names of what was skipped for lack of time.
        failed: names of what ended in an error.
    """

    def __init__(self, seconds: float = inf) -> None:
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self._ends = BEGAN + seconds

    @property
    def ends(self) -> float:
        """Time at which the limit is reached, by ``perf_counter``."""
        return self._ends

    @property
    def left_s(self) -> float:
        """Remaining seconds."""
        return self._ends - perf_counter()

    def say(self, what: str) -> None:
        """Print a progress message."""
        print(f"{perf_counter() - BEGAN:.1f} s: {what}", file=sys.stderr, flush=True)

    def allows(self, seconds: float, what: str) -> bool:
        """Whether there is time for something; if not, it is recorded and reported as left out.

        Args:
            seconds: time that it may take.
            what: its name in the report.
        """
        if seconds <= self.left_s:
            self.say(what)
            return True
        self.left_out.append(what)
        self.say(f"no time for {what}: {self.left_s:.0f} s are left of {seconds:.0f} s")
        return False

    def attempt(self, what: str, work: Callable[[], Result]) -> Result | None:
        """The result of some work; None if it fails, which is reported and ends nothing else.

        Args:
            what: its name in the report.
            work: work of one of the systems that are compared.
        """
        try:
            return work()
        except Exception:  # noqa: BLE001 - the other systems must still be measured
            traceback.print_exc()
            self.failed.append(what)
            return None

    def report(self) -> int:
        """Print what was left out and what failed, if anything; returns the exit status."""
        if self.left_out:
            print(f"\nNo time was left for: {', '.join(self.left_out)}.", flush=True)
        if self.failed:
            print(f"\nFailed: {', '.join(self.failed)}.", flush=True)
        return int(bool(self.failed))


def add_within(parser: argparse.ArgumentParser) -> None:
    """Add an option for the time limit of an :class:`Allowance`."""
    parser.add_argument(
        "--within",
        type=float,
        default=inf,
        help="seconds for all, with imports: what there is no time for is left out",
    )


def add_settle(parser: argparse.ArgumentParser, seconds: float = 60.0) -> None:
    """Add an option for the time that the engine has to prepare its forward passes."""
    parser.add_argument(
        "--settle",
        type=float,
        default=seconds,
        help="most seconds to wait until forwards are prepared and recorded, before runs count",
    )
