"""The contract of every registered rule and policy, including those of installed packages."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guidance import (
    PERTURBATIONS,
    POLICIES,
    RULES,
    STEP_CACHES,
    Policy,
    Rule,
)
from guidance.cfg import CFG
from guidance.composed import Composed, WeightedPrompt
from guidance.residual import Residual
from guidance.testing import (
    check_agreement,
    check_branches,
    check_description,
    check_inputs_are_kept,
    check_moves_open_a_step,
    check_policy,
    check_shapes,
    check_step_cache,
)
from tests.covering import EVERY_CELL, covering
from tests.guidance.cases import (
    PERTURBATION_VARIANTS,
    POLICY_VARIANTS,
    RULE_VARIANTS,
    SHAPE,
    apply,
    draw,
    label,
    one_row,
    settings_of,
    with_memory,
)

NOISE_RATIO = np.array([np.inf, 80.0, 5.42, 1.0, 0.3, 0.28, 0.01])
PROGRESS = np.arange(7) / 7


ESTIMATES = [one for one in POLICY_VARIANTS if one.estimates]


def branches_of(rule: Rule) -> int:
    """The number of branches that the rule requests; if none, one that must not matter."""
    return len(rule.branches) or 1


def test_names_and_texts_are_there_once() -> None:
    for registry in (RULES, POLICIES, PERTURBATIONS, STEP_CACHES):
        names = [kind.model_fields["name"].default for kind in registry]
        assert len(set(names)) == len(names)
        for kind in registry:
            check_description(kind)


SEVERAL = Composed(prompts=(WeightedPrompt(prompt="x"), WeightedPrompt(prompt="y", weight=-1)))
RULES_AT_DEFAULTS = [*(kind.model_validate({}) for kind in RULES), SEVERAL]
POLICIES_AT_DEFAULTS = [*(kind.model_validate({}) for kind in POLICIES), Residual(mode="onetime")]
EXCLUDED = {
    *(("none", policy.name) for policy in POLICIES_AT_DEFAULTS if policy.skips),
    *((rule.name, "embedded") for rule in RULES_AT_DEFAULTS if not rule.plain_cfg),
    ("perp_neg", "residual"),
    ("composed", "residual"),
}
"""All incompatible combinations, which involve residual guidance with the picture itself."""


def test_any_rule_goes_with_any_policy_but_for_these() -> None:
    refused = {
        (rule.name, policy.name)
        for rule, policy in product(RULES_AT_DEFAULTS, POLICIES_AT_DEFAULTS)
        if policy.refuses(rule)
    }
    assert refused == EXCLUDED
    assert Residual(mode="onetime").refuses(SEVERAL) is None


TOGETHER = covering(
    [
        (rule, policy, dtype)
        for rule, policy in product(RULES_AT_DEFAULTS, POLICIES_AT_DEFAULTS)
        if rule.branches and not policy.refuses(rule)
        for dtype in (torch.float32, torch.float64)
    ],
    tuple,
    together=2,
)


def test_a_rule_and_a_policy_make_a_run_together() -> None:
    """Seven stages as in the engine: decide, fill in, combine, keep memory, end when settled."""
    for rule, policy, dtype in TOGETHER:
        run_together(rule, policy, dtype)


def run_together(rule: Rule, policy: Policy, dtype: torch.dtype) -> None:
    branches = len(rule.branches)
    rows = with_memory(draw(3, dtype=dtype, branches=branches), rule.memory_slots)
    kept = with_memory(rows, policy.memory_slots(branches), seed=2).memory
    constants = policy.constants(7, branches, np.full((7, branches * policy.fitted), 0.1))
    evaluated, estimated = (
        answer(NOISE_RATIO, PROGRESS) for answer in (policy.evaluates, policy.estimated)
    )
    assert evaluated.shape == estimated.shape == (7,)
    assert evaluated.dtype == estimated.dtype == np.bool_
    assert not (evaluated & estimated).any()
    assert policy.estimates or not estimated.any()
    for stage in np.flatnonzero(evaluated | estimated):
        parameters = policy.parameters([policy] * 3, rows.x[:1])
        if policy.estimates:
            numbers = rows.x.new_tensor(constants[stage]).expand(3, -1)[..., None, None, None]
            asked = torch.full((3, 1, 1, 1), bool(evaluated[stage]))
            filled = policy.fill(rows, kept, {**parameters, "constants": numbers}, asked)
            assert filled.others.shape == rows.others.shape
            assert filled.memory.shape == kept.shape
            assert filled.others.dtype == filled.memory.dtype == rows.x.dtype
            kept, rows = filled.memory, replace(rows, others=filled.others)
        result = apply(rule, rows)
        assert result.denoised.shape == result.x.shape == rows.x.shape
        assert result.memory.shape == rows.memory.shape
        assert result.denoised.dtype == result.x.dtype == rows.x.dtype
        settled = policy.settled(rows, parameters)
        assert settled.shape == (3,)
        assert settled.dtype == torch.bool
        assert policy.adapts or not settled.any()
        fresh = draw(3, int(stage), dtype, branches)
        rows = replace(fresh, x=result.x, memory=result.memory)


def test_results_have_the_shapes_and_the_type_of_what_went_in() -> None:
    for rule in RULE_VARIANTS:
        check_shapes(rule)


def test_predictions_that_agree_are_left_alone() -> None:
    for rule in RULE_VARIANTS:
        check_agreement(rule)


NEUTRAL: dict[str, dict[str, float]] = {
    "cfg": {},
    "apg": {"eta": 1, "momentum": 0, "norm_threshold": 0},
    "cfg_rescale": {"rescale": 0},
    "cfg_zero_star": {"fitted": 0, "zero_init": 0},
    "dynamic_thresholding": {"limit": 1000},
    "tcfg": {"damping": 0},
    "frequency_decoupled": {},
    "perp_neg": {"negative": 0},
    "composed": {},
    "magnitude_aware": {"damping": 0},
}
"""Parameters at which a rule equals plain CFG with its scale."""
OTHERWISE = {"none", "cfg_plus_plus"}
"""Rules that equal CFG with scale 1, or with a scale for each step: see their own tests."""
OURS = {kind.model_fields["name"].default: kind for kind in RULES if "guidance." in kind.__module__}


def test_each_rule_of_ours_has_a_neutral_setting() -> None:
    assert NEUTRAL.keys() | OTHERWISE == OURS.keys()


def test_each_rule_can_be_plain_cfg() -> None:
    for name, scale in product(NEUTRAL, (0.0, 0.5, 1.0, 4.0, 30.0)):
        kind = OURS[name]
        scales = [field for field in ("scale", "scale_high") if field in kind.model_fields]
        rule = kind.model_validate(NEUTRAL[name] | dict.fromkeys(scales, scale))
        rows = with_memory(draw(3, branches=1), kind.memory_slots)
        result, plain = apply(rule, rows), apply(CFG(scale=scale), rows)
        assert len(rule.branches) == (scale != 1), name
        torch.testing.assert_close(
            result.denoised, plain.denoised, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert torch.equal(result.x, rows.x), name


def test_branches_are_asked_for_only_where_they_can_matter() -> None:
    for rule in RULE_VARIANTS:
        check_branches(rule)


def test_no_rule_moves_x_within_a_step() -> None:
    """Only CFG++ moves x, and samplers rely on one move per step."""
    for rule in RULE_VARIANTS:
        check_moves_open_a_step(rule)


@pytest.mark.parametrize("kind", RULES)
@settings(max_examples=40 if EVERY_CELL else 12)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_rows_with_their_own_parameters_get_what_each_gets_alone(
    kind: type[Rule], data: st.DataObject, seed: int
) -> None:
    own = data.draw(st.lists(settings_of(kind), min_size=1, max_size=5))
    branches = branches_of(own[0])
    own = [setting for setting in own if branches_of(setting) == branches]
    rows = with_memory(draw(len(own), seed, branches=branches), kind.memory_slots)
    flags = st.lists(st.booleans(), min_size=len(own), max_size=len(own))
    opens, closes = (torch.tensor(data.draw(flags)).view(-1, 1, 1, 1) for _ in range(2))
    rows = replace(rows, opens_step=opens, closes_step=closes)
    together = kind.combine(rows, kind.parameters(own, rows.x[:1]))
    for i, setting in enumerate(own):
        alone = apply(setting, one_row(rows, i))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-12, atol=1e-12)


def test_rules_leave_their_inputs_alone() -> None:
    for rule in RULE_VARIANTS:
        check_inputs_are_kept(rule)


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_keep_the_promises_of_a_policy(kind: type[Policy]) -> None:
    check_policy(*(one for one in POLICY_VARIANTS if type(one) is kind))


def test_what_was_evaluated_is_kept_where_a_policy_keeps_nothing() -> None:
    rows = draw(2)
    for policy in POLICY_VARIANTS:
        assert policy.memory_slots(1) or not policy.wants_reference, label(policy)
        if policy.memory_slots(1):
            continue
        filled = policy.fill(rows, rows.memory, {}, torch.ones(2, 1, 1, 1, dtype=torch.bool))
        assert filled.others is rows.others, label(policy)
        assert filled.memory is rows.memory, label(policy)


@settings(max_examples=100 if EVERY_CELL else 10)
@given(seed=st.integers(0, 1000), branches=st.integers(1, 3))
def test_each_row_is_filled_in_as_if_it_were_alone(seed: int, branches: int) -> None:
    for policy in ESTIMATES:
        fill_together_and_alone(policy, seed, branches)


def fill_together_and_alone(policy: Policy, seed: int, branches: int) -> None:
    generator = np.random.default_rng(seed)
    rows = draw(4, seed, branches=branches)
    kept = with_memory(rows, policy.memory_slots(branches), seed).memory
    numbers = torch.from_numpy(generator.normal(size=(4, branches * policy.fitted, 1, 1, 1)))
    evaluated = torch.from_numpy(generator.random((4, 1, 1, 1)) < 0.5)
    before = {name: getattr(rows, name).clone() for name in type(rows).__slots__}
    parameters = {**policy.parameters([policy] * 4, rows.x[:1]), "constants": numbers}
    together = policy.fill(rows, kept, parameters, evaluated)
    for i in range(4):
        row = slice(i, i + 1)
        own = {name: value[row] for name, value in parameters.items()}
        alone = policy.fill(one_row(rows, i), kept[row], own, evaluated[row])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(getattr(rows, name), value) for name, value in before.items())


def test_each_branch_is_filled_in_as_if_it_were_the_only_one() -> None:
    """Two stages of three branches: the first is evaluated, the second is not."""
    for policy in ESTIMATES:
        fill_branches_together_and_alone(policy)


def fill_branches_together_and_alone(policy: Policy) -> None:
    numbers = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, policy.fitted)))

    def run(*chosen: int) -> Tensor:
        own = list(chosen)
        constants = numbers[:, own].flatten(1)[..., None, None, None]
        parameters = {**policy.parameters([policy] * 4, draw(1).x), "constants": constants}
        first, second = (draw(4, seed, branches=3) for seed in range(2))
        first, second = (replace(rows, others=rows.others[:, own]) for rows in (first, second))
        kept = first.x.new_zeros(4, policy.memory_slots(len(own)), *SHAPE)
        yes = torch.ones(4, 1, 1, 1, dtype=torch.bool)
        kept = policy.fill(first, kept, parameters, yes).memory
        return policy.fill(second, kept, parameters, ~yes).others

    together = run(0, 1, 2)
    for k in range(3):
        torch.testing.assert_close(together[:, k], run(k)[:, 0], rtol=1e-12, atol=1e-12)


def test_step_caches_keep_their_promises() -> None:
    for kind in STEP_CACHES:
        check_step_cache(kind.model_validate({}), kind.model_validate({"start": 0.5, "stop": 0.75}))


def test_perturbations_answer_for_each_stage_and_change_something() -> None:
    for perturbation in PERTURBATION_VARIANTS:
        answer = perturbation.evaluates(NOISE_RATIO, PROGRESS)
        assert answer.shape == (7,), label(perturbation)
        assert answer.dtype == np.bool_, label(perturbation)
        assert bool(perturbation.scale) or not answer.any(), label(perturbation)
        # Rows with the same edit are recognized by equality.
        assert hash(perturbation.edit) == hash(perturbation.model_copy().edit)


def test_parameters_are_frozen_and_strange_ones_refused() -> None:
    for kind in (*RULES, *POLICIES, *PERTURBATIONS, *STEP_CACHES):
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
        ("cfg_rescale", "rescale", 1.1, "less than or equal to 1"),
        ("cfg_rescale", "space", "pixels", "velocity.*noise.*denoised"),
        ("cfg_zero_star", "zero_init", 0.6, "less than or equal to 0.5"),
        ("dynamic_thresholding", "limit", 0, "greater than or equal to 0.125"),
        ("dynamic_thresholding", "quantile", 0.4, "greater than or equal to 0.5"),
        ("tcfg", "damping", 2, "less than or equal to 1"),
        ("frequency_decoupled", "scale_high", -1, "greater than or equal to 0"),
        ("perp_neg", "negative", -1, "greater than or equal to 0"),
        ("composed", "prompts", [{"prompt": "x"}] * 9, "at most 8 items"),
        ("magnitude_aware", "damping", -1, "greater than or equal to 0"),
        ("adaptive", "threshold", 1.1, "less than or equal to 1"),
        ("interval", "low", -0.1, "greater than or equal to 0"),
        ("interval", "high", float("inf"), "finite number"),
        ("interval", "stop", 0, "greater than 0"),
        ("pag", "scale", -1, "greater than or equal to 0"),
        ("pag", "layers", [], "at least 1 item"),
        ("pag", "start", 1, "less than 1"),
        ("easy_cache", "threshold", 1.1, "less than or equal to 1"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(
    name: str, field: str, value: Any, sentence: str
) -> None:
    everything = (*RULES, *POLICIES, *PERTURBATIONS, *STEP_CACHES)
    kinds = {kind.model_fields["name"].default: kind for kind in everything}
    with pytest.raises(ValueError, match=f"(?s){field}.*{sentence}"):
        kinds[name].model_validate({field: value})
