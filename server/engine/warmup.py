"""The first calls of a model's networks, and how long its forwards take."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.engine.cost_model import TickCost, measured
from server.engine.rehearsal import Rehearsal
from server.engine.tick.decode import DECODED_AT_ONCE, PIXELS_AT_ONCE
from server.engine.tick.preview import fit_preview

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from server.models.hosted import HostedModel

log = logging.getLogger(__name__)

DETERMINISTIC_THROUGHPUT = 0.8
"""Of the best one, which forwards of fixed rows are to have."""

FEW_ROWS = 4
"""Rows of the largest forward that is timed of a model that is added beside others' ticks."""


@dataclass(frozen=True, slots=True, eq=False)
class Warmth:
    """What the engine wants to know of a model before its first image.

    Attributes:
        colours: of previews, see :func:`fit_preview`.
        cost: of its ticks at its default size, to begin with.
        most_rows: of the forwards that it was measured by.
    """

    colours: Tensor
    cost: TickCost
    most_rows: int


def warm_up(
    model: HostedModel, most: int, guessed_costs: Mapping[int, float] | None = None
) -> Warmth:
    """Run each network of a model before the engine works, in its own thread.

    Args:
        model: loaded.
        most: rows of a forward.
        guessed_costs: seconds of a tick by rows, instead of those of timed forwards.

    Raises:
        MemoryError: not even one row fits.
    """
    colours = _first_colours(model)
    if guessed_costs is not None:
        return Warmth(colours, TickCost(guessed_costs, guessed=True), max(guessed_costs))
    samples = time_forwards(model, most)
    timed = ", ".join(f"{rows}: {1000 * seconds:.1f}" for rows, seconds in samples.items())
    log.info("%s: ms per forward pass, by rows: %s", model.facts.name, timed)
    return Warmth(colours, TickCost(samples), max(samples))


def warm_up_beside_ticks(model: HostedModel) -> Warmth:
    """Run each network of a model that is not the engine's yet, in the caller's thread.

    Raises:
        MemoryError: not even one row fits.
    """
    # Only a guess: what else runs on the device meanwhile is in these times.
    colours, samples = _first_colours(model), time_forwards(model, FEW_ROWS)
    return Warmth(colours, TickCost(samples, guessed=True), max(samples))


def fewest_rows(models: Iterable[Warmth]) -> int:
    """Rows of a forward with most of the best throughput, which are too many for no model.

    An image alone waits for all rows of its forwards, so fewer are better for it. More than were
    measured may not fit into memory.
    """
    return min(one.cost.rows_at(DETERMINISTIC_THROUGHPUT, one.most_rows) for one in models)


def first_calls(model: HostedModel) -> Iterator[Callable[[], object]]:
    """Calls of a model's autoencoder at the numbers of pictures that come in ticks.

    Each is to be made once in the thread that runs the ticks, as torch keeps a thread's choices of
    kernels for itself.
    """
    width, height = model.facts.default_width, model.facts.default_height
    shape, device = model.default_shape, model.device

    def decode(pictures: int) -> Tensor:
        return model.decode(torch.zeros(pictures, *shape, device=device))

    def encode(pictures: int) -> Tensor:
        return model.encode_image(torch.zeros(pictures, 3, height, width, device=device))

    for pictures in range(1, max(1, min(DECODED_AT_ONCE, PIXELS_AT_ONCE // (width * height))) + 1):
        for call in (decode, encode):
            yield lambda call=call, pictures=pictures: call(pictures)


def _first_colours(model: HostedModel) -> Tensor:
    """Colours of previews, once the decoder has run."""
    colours = fit_preview(model)
    model.decode(torch.zeros(1, *model.default_shape, device=model.device))
    return colours


def time_forwards(model: HostedModel, most: int) -> dict[int, float]:
    """Seconds of a forward by its rows, at the model's default picture size.

    Args:
        model: loaded; its networks are warm afterwards.
        most: rows; larger sizes than fit in memory are left out.

    Raises:
        MemoryError: not even one row fits.
    """
    rehearsal = Rehearsal(model, model.facts.default_width, model.facts.default_height)
    return measured(lambda rows: rehearsal.seconds(rows, model.evaluate), most)
