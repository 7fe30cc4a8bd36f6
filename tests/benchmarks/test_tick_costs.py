"""Device operations in a tick, outside the denoiser."""

from __future__ import annotations

import pytest
import torch

from benchmarks.operation_count import OperationCount
from guidance import Rule
from guidance.apg import APG
from guidance.cfg import CFG
from guidance.unguided import Unguided
from samplers import Sampler
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.unipc import UniPC
from server.engine.engine import Engine
from tests.server.by_hand import task
from tests.server.full_ticks import full_ticks
from tests.server.toy_model import Ear, Toy


def test_an_operation_is_what_makes_or_writes_memory() -> None:
    x = torch.ones(4, 4)
    with OperationCount() as count:
        x[0].view(2, 2).unbind()
        x.to(torch.float32)
        assert count.total == 0
        x.to(torch.float16)
        assert count.total == 1
        x[0].add_(1)
        x[:2].copy_(x[2:])
        torch.stack([x, x])
        assert count.total == 4
        count.leaving_out(lambda: x + x)()
        assert count.total == 4


def operations(rule: Rule, samplers: list[Sampler]) -> int:
    """Operations outside the denoiser in the third tick of some images, one for each sampler."""
    model, count = Toy(embeds_scale=False), OperationCount()
    model.evaluate = count.leaving_out(model.evaluate)
    rows = len(samplers) * (1 + len(rule.branches))
    with full_ticks(), torch.inference_mode():
        engine = Engine({"toy": model}, row_budget=max(2, rows), guessed_costs={1: 0.01, 64: 0.01})
        engine._warm_up()
        tasks = [
            task(rule=rule, sampler=sampler, seed=i, previews=False)
            for i, sampler in enumerate(samplers)
        ]
        engine.submit(tasks, Ear(len(tasks)))
        for _ in range(2):
            engine._tick()
        with count:
            engine._tick()
    assert engine.measurements.evaluations == 3 * rows
    return count.total


@pytest.mark.parametrize(("rule", "most"), [(Unguided(), 13), (CFG(), 19), (APG(), 49)])
def test_more_images_of_mixed_samplers_ask_the_device_for_no_more_operations(
    rule: Rule, most: int
) -> None:
    """The host launches each of them, which takes about as long as it takes on the device."""
    alone = operations(rule, [DDIM()])
    assert alone <= most
    assert operations(rule, [DDIM(), DPMSolverPP(), UniPC(), DDIM(), UniPC(), DDIM()]) == alone
