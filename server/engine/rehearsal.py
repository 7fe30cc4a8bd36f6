"""Forward passes with an unconditional text and noise, before any image asks for them."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.faults import free_memory, is_out_of_memory
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from server.models.hosted import HostedModel

    Evaluate = Callable[[Tensor, Tensor, RowInputs], Tensor]

__all__ = ["Rehearsal"]

STEPS = 20
"""Number of steps of the schedule, in whose middle the rows are."""


class Rehearsal:
    """Inputs of rows of a picture size halfway through a run.

    Args:
        model: loaded model.
        width: width of the picture in pixels.
        height: height of the picture in pixels.
        fixed: whether encoded texts have a shape that does not depend on their lengths.
    """

    def __init__(self, model: HostedModel, width: int, height: int, *, fixed: bool = False) -> None:
        self._model = model
        self._fixed = fixed
        self._shape = model.latent_shape(width, height)
        [self._unconditional] = model.encode_prompts([None], width, height)
        schedule = model.schedule(width, height, STEPS)
        self._network_time = float(
            model.network_time(np.array((schedule.t_start + schedule.t_end) / 2))
        )

    def seconds(self, rows: int, evaluate: Evaluate) -> float:
        """Measure the seconds of a forward pass.

        Args:
            rows: number of rows in the pass.
            evaluate: the model's ``evaluate``, or what replaces it.

        Raises:
            MemoryError: the rows do not fit into memory.
        """
        device = self._model.device
        try:
            # Drawn on the CPU, since other threads use a GPU's generator too.
            x = torch.randn(rows, *self._shape).to(device)
            t = torch.full((rows,), self._network_time, device=device)
            inputs = RowInputs(self._model.stack([self._unconditional] * rows, fixed=self._fixed))
            began = perf_counter()
            # Reading one number waits for the device.
            evaluate(x, t, inputs).flatten()[0].item()
            return perf_counter() - began
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory(device)
        raise MemoryError(f"{rows} rows do not fit in memory")
