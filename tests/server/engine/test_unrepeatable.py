"""Operations that a recording of kernels could not repeat are found before it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from server.engine.unrepeatable import unrepeatable

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("as_in_the_engine")

AFAR = torch.device("meta")
"""Stands in for a device that is not the host."""


@pytest.fixture
def as_in_the_engine() -> Iterator[None]:
    """Use inference mode, in which dispatch modes see some operations in other forms."""
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda x: x.sum().item(), "wait for a value"),
        (lambda x: x[x > 0], "size that depends on values"),
        (lambda x: x.nonzero(), "size that depends on values"),
    ],
)
def test_values_that_the_host_reads(work: Callable[[Tensor], object], said: str) -> None:
    found = unrepeatable(lambda: work(torch.arange(4.0)), CPU)
    assert found is not None
    assert said in found


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + torch.ones(4).to(AFAR, non_blocking=True),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: x + torch.tensor(2.0).to(AFAR),
    ],
)
def test_copies_from_the_host(work: Callable[[Tensor], object]) -> None:
    found = unrepeatable(lambda: work(torch.empty(4, device=AFAR)), AFAR)
    assert found is not None
    assert "between the host and the device" in found


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.nn.functional.softmax(x * 2.0 + torch.arange(4, device=x.device), 0),
        lambda x: x[torch.tensor([1], device="cpu")] if x.device == CPU else x,
        lambda x: x.half().float().view(2, 2).T.contiguous(),
        lambda x: x * torch.tensor(2.0),
    ],
)
def test_what_stays_on_the_device_is_repeatable(work: Callable[[Tensor], object]) -> None:
    assert unrepeatable(lambda: work(torch.arange(4.0)), CPU) is None
    assert unrepeatable(lambda: work(torch.empty(4, device=AFAR)), AFAR) is None


def test_the_first_obstacle_is_told_and_the_forward_runs_to_its_end() -> None:
    ended: list[int] = []

    def work() -> None:
        x = torch.arange(4.0)
        x.max().item()
        x.nonzero()
        ended.append(1)

    found = unrepeatable(work, CPU)
    assert found is not None
    assert "value" in found
    assert ended == [1]
