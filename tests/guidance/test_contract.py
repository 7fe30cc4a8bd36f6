"""What every registered rule and policy promises, ours or an installed package's."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidance import POLICIES, RULES, Policy, Rule, stack
from tests.guidance.cases import (
    POLICY_VARIANTS,
    RULE_VARIANTS,
    apply,
    draw,
    label,
    one_row,
    settings_of,
    with_memory,
)

NOISE_RATIO = np.array([np.inf, 80.0, 5.42, 1.0, 0.3, 0.28, 0.01])
PROGRESS = np.arange(7) / 7

each_rule = pytest.mark.parametrize("rule", RULE_VARIANTS, ids=label)
each_policy = pytest.mark.parametrize("policy", POLICY_VARIANTS, ids=label)


@pytest.mark.parametrize("registry", [RULES, POLICIES], ids=["rules", "policies"])
def test_names_and_texts_are_there_once(registry: tuple[type[Rule], ...]) -> None:
    names = [kind.model_fields["name"].default for kind in registry]
    assert len(set(names)) == len(names)
    assert all(kind.summary and kind.source and kind.__doc__ for kind in registry)
    fields = [f for kind in registry for name, f in kind.model_fields.items() if name != "name"]
    assert all(field.description for field in fields)


@pytest.mark.parametrize(("rule", "policy"), list(product(RULES, POLICIES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_rule_goes_with_any_policy(
    rule: type[Rule], policy: type[Policy], dtype: torch.dtype
) -> None:
    """A run of seven stages, as an engine makes it: ask, combine, keep, and end when settled."""
    setting, when = rule.model_validate({}), policy.model_validate({})
    rows = with_memory(draw(3, dtype=dtype), rule.memory_slots)
    guided = when.evaluates(NOISE_RATIO, PROGRESS)
    assert guided.shape == (7,)
    assert guided.dtype == np.bool_
    for evaluated in guided:
        if not (evaluated and setting.needs_other):
            continue
        result = apply(setting, rows)
        assert result.denoised.shape == result.x.shape == rows.x.shape
        assert result.memory.shape == rows.memory.shape
        assert result.denoised.dtype == result.x.dtype == dtype
        settled = policy.settled(rows, stack([when] * 3, rows.x))
        assert settled.shape == (3,)
        assert settled.dtype == torch.bool
        assert policy.adapts or not settled.any()
        rows = replace(rows, x=result.x, memory=result.memory)


@each_rule
def test_predictions_that_agree_are_left_alone(rule: Rule) -> None:
    rows = replace(draw(3), memory=torch.zeros(3, rule.memory_slots, 4, 6, 5, dtype=torch.float64))
    result = apply(rule, replace(rows, other=rows.cond))
    torch.testing.assert_close(result.denoised, rows.cond, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.x, rows.x, rtol=1e-12, atol=1e-12)


@each_rule
def test_the_second_prediction_is_needed_exactly_when_it_can_matter(rule: Rule) -> None:
    rows = with_memory(draw(3, 0), rule.memory_slots)
    other = draw(3, 1).other
    first, second = apply(rule, rows), apply(rule, replace(rows, other=other))
    differs = not (torch.equal(first.denoised, second.denoised) and torch.equal(first.x, second.x))
    assert differs == rule.needs_other


@pytest.mark.parametrize("kind", RULES)
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_rows_with_their_own_parameters_get_what_each_gets_alone(
    kind: type[Rule], data: st.DataObject, seed: int
) -> None:
    own = data.draw(st.lists(settings_of(kind), min_size=1, max_size=5))
    rows = with_memory(draw(len(own), seed), kind.memory_slots)
    closes = data.draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own)))
    rows = replace(rows, closes_step=torch.tensor(closes).view(-1, 1, 1, 1))
    together = kind.combine(rows, stack(own, rows.x))
    for i, setting in enumerate(own):
        alone = apply(setting, one_row(rows, i))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-12, atol=1e-12)


@each_rule
def test_rules_leave_their_inputs_alone(rule: Rule) -> None:
    rows = with_memory(draw(2), rule.memory_slots)
    before = {name: getattr(rows, name).clone() for name in type(rows).__slots__}
    apply(rule, rows)
    assert all(torch.equal(getattr(rows, name), kept) for name, kept in before.items())


@each_policy
def test_policies_answer_for_each_stage_and_row(policy: Policy) -> None:
    answer = policy.evaluates(NOISE_RATIO, PROGRESS)
    assert answer.shape == (7,)
    assert answer.dtype == np.bool_
    rows = draw(4)
    settled = policy.settled(rows, stack([policy] * 4, rows.x))
    alone = [policy.settled(one_row(rows, i), stack([policy], rows.x)) for i in range(4)]
    assert settled.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("kind", [*RULES, *POLICIES])
def test_parameters_are_frozen_and_strange_ones_refused(kind: type[Rule]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(kind.model_validate({}), "name", "other")  # noqa: B010
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        kind.model_validate({"strength_of_coffee": 3})


@pytest.mark.parametrize(
    ("name", "field", "value", "sentence"),
    [
        ("cfg", "scale", -1, "greater than or equal to 0"),
        ("cfg", "scale", 101, "less than or equal to 100"),
        ("cfg", "scale", float("nan"), "finite number"),
        ("apg", "eta", 1.5, "less than or equal to 1"),
        ("apg", "momentum", 1, "less than 1"),
        ("apg", "momentum", -1, "greater than -1"),
        ("apg", "norm_threshold", -3, "greater than or equal to 0"),
        ("cfg_plus_plus", "scale", 7.5, "less than or equal to 1"),
        ("adaptive", "threshold", 1.1, "less than or equal to 1"),
        ("interval", "low", -0.1, "greater than or equal to 0"),
        ("interval", "high", float("inf"), "finite number"),
        ("interval", "stop", 0, "greater than 0"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(
    name: str, field: str, value: float, sentence: str
) -> None:
    kinds = {kind.model_fields["name"].default: kind for kind in (*RULES, *POLICIES)}
    with pytest.raises(ValueError, match=f"(?s){field}.*{sentence}"):
        kinds[name].model_validate({field: value})
