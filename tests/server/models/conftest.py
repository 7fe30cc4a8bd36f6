"""What tests of a model family share: an engine of the module's model, and what it decodes."""

from collections.abc import Iterator

import pytest
from torch import Tensor

from server.engine.engine import Engine
from server.models.hosted import HostedModel
from tests.server.toy_model import started


@pytest.fixture(scope="module")
def engine(model: HostedModel) -> Iterator[Engine]:
    made = started(model, 16)
    yield made
    made.stop(0)


@pytest.fixture
def decoded(model: HostedModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All clean latents that were decoded."""
    seen: list[Tensor] = []
    decode = model.decode

    def recorded(latents: Tensor) -> Tensor:
        seen.extend(latents.clone())
        return decode(latents)

    monkeypatch.setattr(model, "decode", recorded)
    return seen
