"""How many rows a forward should have, measured on the device at start-up."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from samplers import NoiseSchedule
    from server.models.hosted import HostedModel

BATCHES = (2, 4, 8, 16, 32, 64)
REPEATS = 3
NEAR_BEST = 0.95
LONGEST_FORWARD_S = 2.0


def sweep(model: HostedModel, batches: Sequence[int] = BATCHES) -> dict[int, float]:
    """Rows per second at growing batch sizes, at the model's default picture size.

    Stops early where a forward takes seconds, memory runs out or doubling gains nothing.

    Raises:
        torch.OutOfMemoryError: not even the first batch fits.
    """
    facts = model.facts
    size = facts.default_width, facts.default_height
    shape = model.latent_shape(*size)
    [unconditional] = model.encode_prompts([None], *size)
    rates: dict[int, float] = {}
    for rows in batches:
        x = torch.randn(rows, *shape, device=model.device)
        t = torch.full((rows,), _middle(facts.schedule), device=x.device)
        inputs = RowInputs(model.stack([unconditional] * rows))
        try:
            model.evaluate(x, t, inputs)
            seconds = median(_timed(model, x, t, inputs) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        rates[rows] = rows / seconds
        best_before = max((rates[b] for b in rates if b < rows), default=0.0)
        if rates[rows] < 1.02 * best_before or seconds > LONGEST_FORWARD_S:
            break
    return rates


def row_budget_of(rates: Mapping[int, float]) -> int:
    """The smallest batch within 5 % of the best rate: more rows would only add latency."""
    best = max(rates.values())
    return min(rows for rows, rate in rates.items() if rate >= NEAR_BEST * best)


def _middle(schedule: NoiseSchedule) -> float:
    t = np.array((schedule.t_start + schedule.t_end) / 2)
    return float(schedule.conditioning(t))


def _timed(model: HostedModel, x: torch.Tensor, t: torch.Tensor, inputs: RowInputs) -> float:
    began = perf_counter()
    # Reading one number waits for the device.
    model.evaluate(x, t, inputs).flatten()[0].item()
    return perf_counter() - began
