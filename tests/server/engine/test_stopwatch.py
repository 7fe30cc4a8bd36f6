"""Which part of a tick counts as time of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.tick import stage
from server.models.conditioning import Conditioning, StackedConditioning
from server.models.inputs import RowInputs
from tests.server.by_hand import task
from tests.server.toy_model import Ear, Toy


def test_the_rows_are_put_together_and_guided_outside_of_the_denoiser_s_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU is idle while the host puts them together."""
    happened: list[str] = []

    class Watch(stage.Stopwatch):
        def __enter__(self) -> Watch:
            happened.append("begins")
            return super().__enter__()

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            happened.append("ends")
            super().__exit__(kind, error, trace)

    class Model(Toy):
        def stack(
            self, rows: Sequence[Conditioning], *, fixed: bool = False
        ) -> StackedConditioning:
            happened.append("stack")
            return super().stack(rows, fixed=fixed)

        def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
            happened.append("evaluate")
            return super().evaluate(x, t, inputs)

    engine = Engine({"toy": Model()}, row_budget=2, guessed_costs={1: 0.01})
    engine._warm_up()
    engine.submit([task(steps=2)], Ear(1))
    monkeypatch.setattr(stage, "Stopwatch", Watch)
    happened.clear()
    with torch.inference_mode():
        engine._tick()
    assert happened == ["stack", "begins", "evaluate", "ends"]
