"""The first calls of a model's networks, and how long its forwards take."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.cost_model import TickCost, measured
from server.engine.faults import free_memory, is_out_of_memory
from server.engine.tick.preview import fit_preview
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from torch import Tensor

    from server.models.hosted import HostedModel


STEPS = 20
"""Of the schedule in whose middle the rows are."""


FEW_ROWS = 4
"""Rows of the largest forward that is timed of a model that is added beside others' ticks."""


@dataclass(frozen=True, slots=True, eq=False)
class Warmth:
    """What the engine wants to know of a model before its first image.

    Attributes:
        colours: of previews, see :func:`fit_preview`.
        cost: of its ticks at its default size, to begin with.
    """

    colours: Tensor
    cost: TickCost


def warm_up(model: HostedModel) -> Warmth:
    """Run each network of a model that is not the engine's yet, in the caller's thread.

    Raises:
        MemoryError: not even one row fits.
    """
    facts = model.facts
    shape = model.latent_shape(facts.default_width, facts.default_height)
    colours = fit_preview(model)
    model.decode(torch.zeros(1, *shape, device=model.device))
    # Only a guess: what else runs on the device meanwhile is in these times.
    return Warmth(colours, TickCost(time_forwards(model, FEW_ROWS), guessed=True))


def time_forwards(model: HostedModel, most: int) -> dict[int, float]:
    """Seconds of a forward by its rows, at the model's default picture size.

    Args:
        model: loaded; its networks are warm afterwards.
        most: rows; larger sizes than fit in memory are left out.

    Raises:
        MemoryError: not even one row fits.
    """
    size = model.facts.default_width, model.facts.default_height
    shape = model.latent_shape(*size)
    [unconditional] = model.encode_prompts([None], *size)
    schedule = model.schedule(*size, STEPS)
    told = float(model.told(np.array((schedule.t_start + schedule.t_end) / 2)))

    def time_of(rows: int) -> float:
        try:
            x = torch.randn(rows, *shape, device=model.device)
            t = torch.full((rows,), told, device=x.device)
            inputs = RowInputs(model.stack([unconditional] * rows))
            began = perf_counter()
            # Reading one number waits for the device.
            model.evaluate(x, t, inputs).flatten()[0].item()
            return perf_counter() - began
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory(model.device)
        raise MemoryError(f"{rows} rows do not fit in memory")

    return measured(time_of, most)
