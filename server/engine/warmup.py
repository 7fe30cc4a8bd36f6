"""The first forwards of a model, and how long they take."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.cost_model import measured
from server.engine.faults import free_memory, is_out_of_memory
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from server.models.hosted import HostedModel


STEPS = 20
"""Of the schedule in whose middle the rows are."""


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
