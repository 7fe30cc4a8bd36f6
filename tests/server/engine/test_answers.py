"""A faulty rule or policy is named in the error, and only its own image fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidance import (
    CFG,
    PAG,
    Branch,
    EasyCache,
    Edit,
    EluCD,
    Filled,
    GradientFree,
    Guided,
    Policy,
    Reference,
    Rows,
    Rule,
)
from guidance.step_cache import Decision
from server.engine.engine import Engine
from server.engine.guidance_plan import plan_guidance
from server.engine.terms.classifier import ClassifierGradientTerm, ReferenceGuidanceTerm
from server.engine.tick.answers import answering
from server.errors import RowFailed, WeftError
from server.requests.schema import GenerateRequest
from server.service.planner import Planner
from server.settings import Limits
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
    """Returns what would be broadcast over the rows of every request that has this rule."""

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
    """Returns what fits when alone, so that ticks of several images would be repeated forever."""

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


class Exits(Faulty, frozen=True):
    """Would end the engine's thread."""

    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        sys.exit("not told to clients")


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
        (Exits, "failed with SystemExit; the server's log has the details."),
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


class Forgets(EasyCache, frozen=True):
    @classmethod
    def decide(cls, *_: Any, **__: Any) -> Decision:
        raise KeyError("not told to clients")


def test_a_step_cache_that_fails_is_named(engine: Engine) -> None:
    heard = run(engine, [task(), task(cache=Forgets())])
    assert list(heard.results) == [0]
    said = "The step cache 'easy_cache' failed with KeyError; the server's log has the details."
    assert str(heard.errors[1]) == said


class Aimless(EluCD, frozen=True):
    @classmethod
    def objective(cls, *_: Any, **__: Any) -> Tensor:
        raise KeyError("not told to clients")


class Unread(GradientFree, frozen=True):
    @classmethod
    def refer(cls, *_: Any, **__: Any) -> Reference:
        raise KeyError("not told to clients")


class Classifying(Toy):
    classifier: Any = SimpleNamespace(heads={"shape": ("star", "circle")})

    def classify(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        return {"shape": x.mean((2, 3))[:, :2]}


@pytest.mark.parametrize(
    "term",
    [
        ClassifierGradientTerm(Aimless(), (0,), (1.0,) * 6),
        ReferenceGuidanceTerm(Unread(), (0,), (1.0,) * 6, ("a star", "a circle")),
    ],
    ids=["gradient", "reference"],
)
def test_a_classifier_term_that_fails_is_named(
    term: ClassifierGradientTerm | ReferenceGuidanceTerm,
) -> None:
    made = started(Classifying(), 8)
    heard = run(made, [task(), task(terms=(term,))])
    made.stop(0)
    assert list(heard.results) == [0]
    name = term.guidance.name
    said = f"The classifier term '{name}' failed with KeyError; the server's log has the details."
    assert str(heard.errors[1]) == said


class ExitsEarly(Faulty, frozen=True):
    @property
    def branches(self) -> tuple[Branch, ...]:
        sys.exit("not told to clients")


class ExitsInTheLayout(PAG, frozen=True):
    @property
    def edit(self) -> Edit:
        sys.exit("not told to clients")


EXITS = r"^A plug-in failed with SystemExit; the server's log has the details\.$"


def test_a_rule_that_exits_before_the_run_costs_its_own_request_alone() -> None:
    asked = replace(task(), rule=ExitsEarly())
    with pytest.raises(WeftError, match=EXITS):
        plan_guidance(asked)


def test_a_perturbation_that_exits_costs_its_own_request_alone() -> None:
    with pytest.raises(WeftError, match=EXITS):
        task(settings=(ExitsInTheLayout(),))


def test_a_part_that_exits_while_a_request_is_checked_costs_that_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.service.planner.resolve", lambda *_: sys.exit(1))
    request = GenerateRequest(prompt="a star")
    with pytest.raises(WeftError, match=EXITS):
        Planner(Limits()).prepare(request, Toy(), None)


def test_too_little_memory_is_not_a_rules_own_fault() -> None:
    with pytest.raises(torch.OutOfMemoryError), answering(CFG(), torch.device("cpu")):
        raise torch.OutOfMemoryError("no room")
