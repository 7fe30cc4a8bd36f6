"""The time that a benchmark may take, and what it says of its progress."""

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

LONGEST_IMPORTS_S: Final = 300.0


def _age_s() -> float:
    """Seconds since this process began, with its imports; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    # Some containers have a clock of their own, and no such times of processes.
    return age_s if 0 <= age_s < LONGEST_IMPORTS_S else 0.0


BEGAN: Final = perf_counter() - _age_s()


class Allowance:
    """How long the process may take, from its start with all imports.

    It says on the standard error what is done, each line with the seconds since that start.

    Args:
        seconds: in all.

    Attributes:
        left_out: what there was no time for.
        failed: what ended in an error.
    """

    def __init__(self, seconds: float = inf) -> None:
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self._ends = BEGAN + seconds

    @property
    def ends(self) -> float:
        """When it is over, by ``perf_counter``."""
        return self._ends

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._ends - perf_counter()

    def say(self, what: str) -> None:
        """Tell what has been done, or is being done."""
        print(f"{perf_counter() - BEGAN:.1f} s: {what}", file=sys.stderr, flush=True)

    def allows(self, seconds: float, what: str) -> bool:
        """Whether there is time for something; where there is not, it is left out, and said so.

        Args:
            seconds: that it may take.
            what: as the report names it.
        """
        if seconds <= self.left_s:
            self.say(what)
            return True
        self.left_out.append(what)
        self.say(f"no time for {what}: {self.left_s:.0f} s are left of {seconds:.0f} s")
        return False

    def attempt(self, what: str, work: Callable[[], Result]) -> Result | None:
        """What some work comes to; None if it fails, which is told, and the benchmark goes on.

        Args:
            what: as the report names it.
            work: of one of the systems that are compared.
        """
        try:
            return work()
        except Exception:  # noqa: BLE001 - the other systems are still to be measured
            traceback.print_exc()
            self.failed.append(what)
            return None

    def report(self) -> int:
        """Print what was left out and what failed, if anything; the status to exit with."""
        if self.left_out:
            print(f"\nNo time was left for: {', '.join(self.left_out)}.", flush=True)
        if self.failed:
            print(f"\nFailed: {', '.join(self.failed)}.", flush=True)
        return int(bool(self.failed))


def add_within(parser: argparse.ArgumentParser) -> None:
    """Add the limit of time that an :class:`Allowance` has."""
    parser.add_argument(
        "--within",
        type=float,
        default=inf,
        help="seconds for all, with imports: what there is no time for is left out",
    )


def add_settle(parser: argparse.ArgumentParser, seconds: float = 60.0) -> None:
    """Add the time that the engine has to prepare its forwards."""
    parser.add_argument(
        "--settle",
        type=float,
        default=seconds,
        help="most seconds to wait until forwards are prepared and recorded, before runs count",
    )
