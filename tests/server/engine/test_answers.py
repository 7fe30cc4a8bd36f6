"""A rule or a policy that is at fault is named, and costs its own image alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidance import CFG, Filled, Guided, Policy, Rows, Rule
from server.engine.engine import Engine
from server.engine.guidance_plan import plan_guidance
from server.engine.tick.answers import answering
from server.errors import RowFailed, WeftError
from tests.server.by_hand import task
from tests.server.toy_model import Toy, run, started


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = started(Toy(), 16)
    yield made
    made.stop(0)


class Faulty(Rule, frozen=True):
    summary: ClassVar[str] = "At fault."
    source: ClassVar[str] = "None."
    memory_slots: ClassVar[int] = 1
    name: Literal["faulty"] = "faulty"

    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        raise NotImplementedError


class WrongShape(Faulty, frozen=True):
    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return Guided(rows.cond[:, :2], rows.x, rows.memory)


class OneForAll(Faulty, frozen=True):
    """Would be broadcast over the rows of every request that has this rule."""

    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return Guided(rows.cond.mean(0), rows.x, rows.memory)


class MovedElsewhere(Faulty, frozen=True):
    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return Guided(rows.cond, rows.x[..., :3], rows.memory)


class TooMuchMemory(Faulty, frozen=True):
    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return Guided(rows.cond, rows.x, rows.others.repeat(1, 2, 1, 1, 1))


class Doubled(Faulty, frozen=True):
    """Would fit where it is alone, so that ticks of several images were repeated for ever."""

    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return Guided(rows.cond.double(), rows.x, rows.memory)


class NoTuple(Faulty, frozen=True):
    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        return rows.cond  # type: ignore[return-value]


class Raises(Faulty, frozen=True):
    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        raise KeyError("not told to clients")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WrongShape, "returned denoised of shape [1, 2, 4, 4], not [1, 4, 4, 4]."),
        (OneForAll, "returned denoised of shape [4, 4, 4], not [1, 4, 4, 4]."),
        (MovedElsewhere, "returned x of shape [1, 4, 4, 3], not [1, 4, 4, 4]."),
        (TooMuchMemory, "returned memory of shape [1, 2, 4, 4, 4], not [1, 1, 4, 4, 4]."),
        (Doubled, "returned denoised of type torch.float64, not torch.float32."),
        (NoTuple, "returned Tensor, not Guided."),
        (Raises, "failed with KeyError; the server's log has the details."),
    ],
)
def test_what_a_rule_did_wrong_is_said_with_its_name(
    engine: Engine, kind: type[Faulty], said: str
) -> None:
    heard = run(engine, [task(), task(kind()), task(CFG(scale=2))])
    assert sorted(heard.results) == [0, 2]
    assert isinstance(heard.errors[1], RowFailed)
    assert str(heard.errors[1]) == f"The rule 'faulty' {said}"


class Guesses(Policy, frozen=True):
    summary: ClassVar[str] = "At fault."
    source: ClassVar[str] = "None."
    estimates: ClassVar[bool] = True
    name: Literal["guesses"] = "guesses"

    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return progress < 0.5

    @classmethod
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        return Filled(rows.cond, memory)


def test_a_policy_that_fills_in_another_shape_is_named(engine: Engine) -> None:
    heard = run(engine, [task(), task(policy=Guesses())])
    assert list(heard.results) == [0]
    said = "The policy 'guesses' returned others of shape [1, 4, 4, 4], not [1, 1, 4, 4, 4]."
    assert str(heard.errors[1]) == said


class Adapts(Guesses, frozen=True):
    estimates: ClassVar[bool] = False
    adapts: ClassVar[bool] = True

    @classmethod
    def settled(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Tensor:
        return rows.x.abs().amax((1, 2, 3)) - 2


def test_a_policy_that_says_by_numbers_whether_it_is_settled_is_named(engine: Engine) -> None:
    heard = run(engine, [task(), task(policy=Adapts())])
    assert list(heard.results) == [0]
    said = "of type torch.float32 and shape [1], not torch.bool and [1]."
    assert str(heard.errors[1]) == f"The policy 'guesses' returned settled {said}"


class TwoStages(Guesses, frozen=True):
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        return np.ones(2, np.bool_)


def test_a_policy_that_answers_for_too_few_stages_is_named_before_the_run() -> None:
    said = r"The policy 'guesses' gave an array of shape \[2\]; .* the 6 stages of the run"
    with pytest.raises(WeftError, match=said):
        plan_guidance(task(policy=TwoStages(), steps=6))


class NoStages(Guesses, frozen=True):
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        raise KeyError("not told to clients")


def test_a_policy_that_fails_before_the_run_is_named() -> None:
    said = r"^The policy 'guesses' failed with KeyError; the server's log has the details\.$"
    with pytest.raises(WeftError, match=said):
        plan_guidance(task(policy=NoStages()))


def test_too_little_memory_is_not_a_rules_own_fault() -> None:
    with pytest.raises(torch.OutOfMemoryError), answering(CFG(), torch.device("cpu")):
        raise torch.OutOfMemoryError("no room")
