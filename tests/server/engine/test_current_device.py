"""An engine on a GPU that is not the first of its machine."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch

from server.engine.engine import Engine
from tests.server.toy_model import Toy


def test_an_engine_works_on_the_streams_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event of another GPU's stream would say at once that a picture has arrived."""
    current, during = [torch.device("cuda", 0)], list[torch.device]()

    @contextmanager
    def made_current(device: torch.device) -> Generator[None]:
        current.append(device)
        yield
        current.pop()

    def warm_up(_: Engine) -> None:
        during.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(Engine, "_warm_up", warm_up)
    monkeypatch.setattr(Engine, "_wait_for_work", lambda _: False)
    engine = Engine({"toy": Toy()}, row_budget=2, guessed_costs={1: 0.01})
    engine._device = torch.device("cuda", 1)
    engine.start()
    engine.stop(0)
    assert during == [torch.device("cuda", 1)]
