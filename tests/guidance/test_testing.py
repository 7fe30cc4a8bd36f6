"""The checks for authors of rules and step caches: each detects its defect and reports it."""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from guidance import (
    APG,
    CFG,
    Branch,
    CFGPlusPlus,
    EasyCache,
    Filled,
    Guided,
    Policy,
    Rows,
    Unguided,
)
from guidance.branch import EMPTY, NEGATIVE
from guidance.rule import ScaledRule
from guidance.step_cache import Evaluation
from guidance.testing import check_policy, check_rule, check_step_cache


class Broken(ScaledRule, frozen=True):
    """Classifier-free guidance with a selectable defect."""

    summary: ClassVar[str] = "Broken."
    source: ClassVar[str] = "None."
    name: Literal["broken"] = "broken"
    defect: ClassVar[str] = ""

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        if self.defect == "unasked":
            return ()
        return (NEGATIVE, EMPTY) if self.defect == "unused" else (NEGATIVE,)

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        scale = parameters["scale"]
        guided = rows.cond + (scale - 1) * (rows.cond - rows.other)
        x = rows.x
        match cls.defect:
            case "neighbours":
                push = rows.cond - rows.other
                guided = rows.cond + push / (1 + push.std())
            case "shared":
                guided = rows.cond + (scale.mean() - 1) * (rows.cond - rows.other)
            case "agreement":
                guided = 1.1 * guided
            case "moves":
                x = x + guided - rows.cond
            case "inputs":
                rows.others.mul_(2)
            case "shape":
                guided = guided.mean(1)
            case _:
                pass
        return Guided(guided, x, rows.memory)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("neighbours", "denoised depends on other rows"),
        ("shared", "denoised depends on other rows"),
        ("agreement", "changes predictions that all agree"),
        ("moves", "moves x within a step, where opens_step is false"),
        ("inputs", "writes into rows.others"),
        ("shape", r"denoised is \[3, 6, 5\] of .*, not \[3, 4, 6, 5\]"),
        ("unused", "asks for branch 1 and does not use it"),
        ("unasked", "uses a branch that it does not ask for"),
    ],
)
def test_a_broken_promise_is_named(
    defect: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "defect", defect)
    with pytest.raises(AssertionError, match=sentence):
        check_rule(Broken(), Broken(scale=7.5))


def test_missing_texts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "source", "")
    with pytest.raises(AssertionError, match="Broken has no source"):
        check_rule(Broken())


def test_rules_that_keep_their_promises_pass() -> None:
    check_rule(Broken(), Broken(scale=7.5))
    check_rule(CFG(), CFG(scale=1.0), CFG(scale=0.0))
    check_rule(APG(), APG(momentum=0.0, eta=1.0))
    check_rule(CFGPlusPlus())
    check_rule(Unguided())


class OfTheBatch(EasyCache, frozen=True):
    """Takes its rate from all rows together, like code written for one image."""

    @classmethod
    @override
    def learned(cls, before: Evaluation, now: Evaluation) -> Tensor:
        return super().learned(before, now).mean(0, keepdim=True).expand(len(now.x), -1)


def test_a_step_cache_that_mixes_its_rows_is_found() -> None:
    check_step_cache(EasyCache(), EasyCache(threshold=0.5))
    with pytest.raises(AssertionError, match="numbers depends on other rows"):
        check_step_cache(OfTheBatch(), OfTheBatch(threshold=0.5))


class Guess(Policy, frozen=True):
    """Evaluates every other stage and estimates the others, with a selectable defect."""

    summary: ClassVar[str] = "Guesses."
    source: ClassVar[str] = "None."
    estimates: ClassVar[bool] = True
    defect: ClassVar[str] = ""
    name: Literal["guess"] = "guess"
    weight: float = Field(default=1.0, description="Of what is remembered.")

    @override
    def evaluates(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        asked = np.arange(len(progress)) % 2 == 0
        match self.defect:
            case "numbers":
                return asked.astype(float)  # type: ignore[return-value]
            case "stages":
                return asked[:-1]
            case _:
                return asked

    @override
    def estimated(
        self, noise_ratio: NDArray[np.float64], progress: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        known = self.evaluates(noise_ratio, progress)
        return np.ones_like(known) if self.defect == "both" else ~known

    @override
    def memory_slots(self, branches: int) -> int:
        return branches

    @classmethod
    @override
    def fill(
        cls, rows: Rows, memory: Tensor, parameters: Mapping[str, Tensor], evaluated: Tensor
    ) -> Filled:
        evaluated, weight = evaluated[:, None], parameters["weight"][:, None]
        filled = rows.others.where(evaluated, rows.cond[:, None] + weight * memory)
        match cls.defect:
            case "shape":
                filled = filled[:, 0]
            case "neighbours":
                filled = filled.where(evaluated, filled.mean(0, keepdim=True))
            case "inputs":
                rows.others.mul_(2)
            case _:
                pass
        return Filled(filled, (rows.others - rows.cond[:, None]).where(evaluated, memory))

    @classmethod
    @override
    def settled(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Tensor:
        answer = super().settled(rows, parameters)
        match cls.defect:
            case "ends":
                return ~answer
            case "one answer":
                return answer.any()
            case _:
                return answer


def test_a_policy_without_defects_passes() -> None:
    check_policy(Guess(), Guess(weight=0.5))


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("numbers", "evaluates gives float64 of shape [1] for 1 stages, not one bool for each"),
        ("stages", "evaluates gives bool of shape [0] for 1 stages, not one bool for each"),
        ("both", "both evaluates and estimates stage 0"),
        ("shape", "others is [2, 4, 6, 5] of torch.float64, not [2, 1, 4, 6, 5] of torch.float64"),
        ("neighbours", "others depends on other rows"),
        ("inputs", "writes into rows.others"),
        ("ends", "ends guidance, and does not say so by `adapts`"),
        ("one answer", "settled is [] of torch.bool, not one bool for each of 2 rows"),
    ],
)
def test_a_defect_of_a_policy_is_found(
    defect: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guess, "defect", defect)
    with pytest.raises(AssertionError, match=re.escape(sentence)):
        check_policy(Guess())


def test_estimates_that_the_class_does_not_declare_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Guess, "estimates", False)
    with pytest.raises(AssertionError, match="does not say so by `estimates`"):
        check_policy(Guess())
