"""The cost of a sampler compared with that of the model: its plan, and its part of a tick."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samplers import advance
from samplers.timesteps import LogSNR
from studies.samplers.cells import planned

if TYPE_CHECKING:
    from collections.abc import Callable

    from samplers import Plan
    from samplers.statistics import Statistics
    from server.models.hosted import HostedModel
    from studies.samplers.cells import Contender
    from studies.samplers.statistics_files import StatisticsFiles

ROUNDS = 20
STEPS = 20
SCALE = 4.0
ROWS = (8, 32)
EMBEDDED = (4, 16, 16)
LARGE = (4, 64, 64)
WARM_UP = 2


def of(contender: Contender, model: HostedModel, files: StatisticsFiles) -> dict[str, Any]:
    """Milliseconds to make a plan, and to apply one stage of it to some rows.

    Raises:
        Missing: the sampler or its statistics do not exist.
    """
    facts = model.facts
    shape = model.latent_shape(facts.default_width, facts.default_height)
    statistics, large = (
        _enlarged(files.find(contender.kept, SCALE, EMBEDDED), to) for to in (shape, LARGE)
    )
    sampler = contender.sampler(SCALE)
    schedule = model.default_schedule
    grid = schedule.grid(LogSNR(), STEPS, t_end=schedule.t_end)
    plan = planned(sampler, grid, statistics)
    return {
        "plan": 1000 * _min_seconds(lambda: planned(sampler, grid, statistics)),
        "plan_large": 1000 * _min_seconds(lambda: planned(sampler, grid, large), WARM_UP),
        **{f"advance_{rows}": _advance_ms(plan, rows, shape, model.device) for rows in ROWS},
    }


def _enlarged(statistics: Statistics | None, shape: tuple[int, int, int]) -> Statistics | None:
    """The same statistics repeated over a larger latent, for timing only."""
    if statistics is None or statistics.l.shape[2:] == (1, 1):
        return statistics
    sides = zip(shape[1:], statistics.l.shape[2:], strict=True)
    tiles = (1, 1, *(large // small for large, small in sides))
    l, s, b = (np.tile(a, tiles) for a in (statistics.l, statistics.s, statistics.b))  # noqa: E741
    return replace(statistics, l=l, s=s, b=b)


def tick_ms(model: HostedModel, rows: int) -> float:
    """Milliseconds of one forward pass of the model."""
    shape = model.latent_shape(model.facts.default_width, model.facts.default_height)
    with torch.inference_mode():
        x = torch.randn(rows, *shape, device=model.device)
        t = torch.full((rows,), 500.0, device=model.device)
        inputs = model.inputs(["a red circle"] * rows)
        return 1000 * _min_seconds(lambda: model.evaluate(x, t, inputs))


def _advance_ms(plan: Plan, rows: int, shape: tuple[int, int, int], device: torch.device) -> float:
    """Milliseconds to gather the rows' tables of a stage and apply them, as the engine does."""
    stage = plan.evaluations // 2
    table = torch.from_numpy(plan.tables[stage]).to(device, torch.float32)
    columns = torch.randn(rows, plan.slots + 2, *shape, device=device)
    with torch.inference_mode():
        return 1000 * _min_seconds(lambda: advance(columns, torch.stack([table] * rows)))


def _min_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Minimum time over some rounds, as other load on the machine only adds to the time."""
    times: list[float] = []
    for _ in range(rounds + WARM_UP):
        _wait()
        began = perf_counter()
        work()
        _wait()
        times.append(perf_counter() - began)
    return min(times[WARM_UP:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
