"""Warm-up of a model: the first calls of its networks, and the timing of its forward passes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.engine.cost_model import TickCost, measured
from server.engine.rehearsal import Rehearsal
from server.engine.tick.preview import fit_preview

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from server.models.hosted import HostedModel

log = logging.getLogger(__name__)

DETERMINISTIC_THROUGHPUT = 0.8
"""Share of the best throughput that forward passes with fixed rows should reach."""

MAX_QUICK_WARM_UP_ROWS = 4
"""Rows of the largest pass that is timed for a model that is added while ticks run."""


@dataclass(frozen=True, slots=True, eq=False)
class WarmUpResult:
    """What the engine needs to know about a model before its first image.

    Attributes:
        colors: colors of previews, see :func:`fit_preview`.
        cost: initial cost of its ticks at its default size.
        max_rows: rows of the largest forward pass that was measured.
    """

    colors: Tensor
    cost: TickCost
    max_rows: int


def warm_up(
    model: HostedModel, max_rows: int, guessed_costs: Mapping[int, float] | None = None
) -> WarmUpResult:
    """Run each network of a model before the engine works, in the engine's thread.

    Args:
        model: loaded model.
        max_rows: maximum number of rows in a forward pass.
        guessed_costs: seconds of a tick by number of rows, used instead of timing forward passes.

    Raises:
        MemoryError: not even one row fits.
    """
    colors = _first_colors(model)
    if guessed_costs is not None:
        return WarmUpResult(colors, TickCost(guessed_costs, guessed=True), max(guessed_costs))
    samples = time_forwards(model, max_rows)
    timed = ", ".join(f"{rows}: {1000 * seconds:.1f}" for rows, seconds in samples.items())
    log.info("%s: ms per forward pass, by rows: %s", model.facts.name, timed)
    return WarmUpResult(colors, TickCost(samples), max(samples))


def warm_up_beside_ticks(model: HostedModel) -> WarmUpResult:
    """Run each network of a model that is not the engine's yet, in the caller's thread.

    Raises:
        MemoryError: not even one row fits.
    """
    # Only a guess, since the times include other work on the device.
    colors, samples = _first_colors(model), time_forwards(model, MAX_QUICK_WARM_UP_ROWS)
    return WarmUpResult(colors, TickCost(samples, guessed=True), max(samples))


def common_fixed_rows(models: Iterable[WarmUpResult]) -> int:
    """Fewest rows of a pass with most of the best throughput, and not too many for any model.

    A single image waits for all rows of its passes, so fewer are better for it. More rows than were
    measured may not fit into memory.
    """
    return min(one.cost.rows_at(DETERMINISTIC_THROUGHPUT, one.max_rows) for one in models)


def _first_colors(model: HostedModel) -> Tensor:
    """Fit the colors of previews, and run the decoder once."""
    colors = fit_preview(model)
    model.decode(torch.zeros(1, *model.default_shape, device=model.device))
    return colors


def time_forwards(model: HostedModel, max_rows: int) -> dict[int, float]:
    """Measure seconds of a forward pass by number of rows, at the default picture size.

    Args:
        model: loaded model; its networks are warm afterwards.
        max_rows: maximum number of rows; sizes that do not fit in memory are left out.

    Raises:
        MemoryError: not even one row fits.
    """
    rehearsal = Rehearsal(model, model.facts.default_width, model.facts.default_height)
    return measured(lambda rows: rehearsal.seconds(rows, model.evaluate), max_rows)
