"""The checks for authors of rules and step caches: each finds its defect, and says it."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import pytest
from torch import Tensor
from typing_extensions import override

from guidance import APG, CFG, Branch, CFGPlusPlus, EasyCache, Guided, Rows, Unguided
from guidance.branch import EMPTY, NEGATIVE
from guidance.rule import ScaledRule
from guidance.step_cache import Evaluation
from guidance.testing import check_rule, check_step_cache


class Broken(ScaledRule, frozen=True):
    """Classifier-free guidance with one defect of choice."""

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
    """Takes its rate from all rows together, as code does that was written for one image."""

    @classmethod
    @override
    def learned(cls, before: Evaluation, now: Evaluation) -> Tensor:
        return super().learned(before, now).mean(0, keepdim=True).expand(len(now.x), -1)


def test_a_step_cache_that_mixes_its_rows_is_found() -> None:
    check_step_cache(EasyCache(), EasyCache(threshold=0.5))
    with pytest.raises(AssertionError, match="numbers depends on other rows"):
        check_step_cache(OfTheBatch(), OfTheBatch(threshold=0.5))
