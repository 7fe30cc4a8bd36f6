"""The page docs/promises.md: a table with a line for each promise, as last measured."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.promises.promise import Outcome, Promise

__all__ = ["line", "page"]

TITLES: Final = (
    "promise",
    "how it is measured",
    "target",
    "figure",
    "kept",
    "defence removed",
    "figure then",
    "load",
)
HEAD: Final = """# Promises

What the server promises, measured on `weft serve` with the embedded model by `make promises`, which
writes this page. Each measurement is made a second time on a server from which the defence is taken
away, where it has to find the promise broken: a measurement that cannot fail shows nothing. Routes
and fields come from the application's own tables, so that a new one is measured too. Limits are
lower than the defaults where waiting for them would take minutes; [operating](operating.md#limits)
lists the limits.

Measured on {cores} cores. The load is the machine's load average before the measurement, by other
work: where it exceeds the cores, times are longer than on an idle machine and shares of it noisy.

"""


def line(promise: Promise, outcome: Outcome, control: Outcome, load: float) -> str:
    """The table's line for a promise.

    Args:
        promise: promise that was measured.
        outcome: outcome on the server.
        control: outcome on the weakened server.
        load: load average before the measurement.
    """
    return _row(
        promise.claim,
        promise.method,
        promise.target,
        outcome.figure,
        "yes" if outcome.kept else "**no**",
        promise.weakness,
        control.figure if not control.kept else f"{control.figure} (**not noticed**)",
        f"{load:.1f}",
    )


def page(promises: Sequence[Promise], lines: Sequence[str], before: str) -> str:
    """The page with new lines; promises without a new line keep that of the previous page.

    Args:
        promises: all promises, in order.
        lines: newly measured lines.
        before: the previous page.
    """
    known = {_claim(one): one for one in before.splitlines(keepends=True) if _is_row(one)}
    known |= {_claim(one): one for one in lines}
    table = [known[one.claim] for one in promises if one.claim in known]
    ruler = "|" + "---|" * len(TITLES) + "\n"
    return HEAD.format(cores=os.cpu_count()) + _row(*TITLES) + ruler + "".join(table)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _is_row(text: str) -> bool:
    return text.count(" | ") == len(TITLES) - 1


def _claim(row: str) -> str:
    return row.removeprefix("| ").partition(" | ")[0]
