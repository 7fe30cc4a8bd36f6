"""The contract of rules, policies and step caches, as checks to call from the tests of a new one.

``check_rule(MyRule(), MyRule(scale=7.5))`` runs all checks of a rule, ``check_policy`` those of a
policy and ``check_step_cache`` those of a step cache. Each raises AssertionError with a sentence
that says which promise is broken, and at which parameters. Weft applies the same checks to its own.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from guidance.rule import Guided, Rows
from guidance.step_cache import Evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, dtype

    from guidance.perturbation import Perturbation
    from guidance.policy import Policy
    from guidance.rule import Rule
    from guidance.step_cache import Decision, StepCache

SHAPE: Final = (4, 6, 5)
"""Shape of the latents that rules are checked on; no two axes are equal."""
CLOSE: Final = 1e-12
"""Tolerance for float64 rounding, relative and absolute."""


def check_rule(*settings: Rule) -> None:
    """Check all promises of a rule, with each of these settings and in one batch of all of them.

    Args:
        settings: settings of one rule: its defaults, and any that behave differently.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_description(type(settings[0]))
    for rule in settings:
        check_inputs_are_kept(rule)
        check_shapes(rule)
        check_agreement(rule)
        check_branches(rule)
        check_moves_open_a_step(rule)
    # Rows with the same number of branches share a call, as they do in the server.
    for count in sorted({len(rule.branches) for rule in settings}):
        together = [rule for rule in settings if len(rule.branches) == count]
        check_rows_are_independent(together)


def check_policy(*settings: Policy) -> None:
    """Check all promises of a policy, with each of these settings and in one batch of all of them.

    Args:
        settings: settings of one policy: its defaults, and any that behave differently.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_description(type(settings[0]))
    for policy in settings:
        check_stages(policy)
    # Rows with equal memory slots and equal non-numeric fields share a call in the server.
    for branches in (1, 2):
        alike: dict[object, list[Policy]] = {}
        for policy in settings:
            if policy.most_branches is None or branches <= policy.most_branches:
                texts = tuple(value for _, value in policy if not isinstance(value, int | float))
                alike.setdefault((policy.memory_slots(branches), texts), []).append(policy)
        for together in alike.values():
            check_filled_in(together, branches)


def check_step_cache(*settings: StepCache) -> None:
    """Check all promises of a step cache, with each of these settings and in one batch of them.

    It must not decide before its warm-up or for the last stage, and its results for a row must not
    depend on other rows.

    Args:
        settings: settings of one cache: its defaults, and any that behave differently.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    from numpy import arange, logspace

    kind, stages = type(settings[0]), 12
    check_description(kind)
    for cache in settings:
        able = cache.may_recall(logspace(2, -2, stages), arange(stages) / stages)
        _hold(len(able) == stages, f"{cache!r} does not answer for each stage")
        _hold(not able[: kind.warm_up].any(), f"{cache!r} decides before its warm-up")
        _hold(not able[-1], f"{cache!r} leaves out the last evaluation of a run")
    rows = [draw(len(settings), seed) for seed in range(4)]
    together = _decide(settings, rows)
    for i, cache in enumerate(settings):
        alone = _decide([cache], [one_row(one, i) for one in rows])
        for name, mine in zip(together._fields, together, strict=True):
            found, wanted = mine[i : i + 1].double(), getattr(alone, name).double()
            same = found.allclose(wanted, rtol=CLOSE, atol=CLOSE, equal_nan=True)
            _hold(same, f"{cache!r}: {name} depends on other rows")


def _decide(settings: Sequence[StepCache], rows: Sequence[Rows]) -> Decision:
    """The decision after two evaluations and a stage that recalled; the data are random."""
    kind, (first, second, third, following) = type(settings[0]), rows
    before, last = Evaluation(first.x, first.cond), Evaluation(second.x, second.cond)
    parameters = kind.parameters(settings, last.x)
    once = kind.decide(last, kind.learned(before, last), last.x, third.x, parameters)
    return kind.decide(last, once.numbers, third.x, following.x, parameters)


def check_description(kind: type[Rule | Policy | Perturbation | StepCache]) -> None:
    """Check for a name, a summary, a source, a docstring and a description of each field.

    These reach the API's documentation, the catalog and the command line.

    Raises:
        AssertionError: one of them is missing.
    """
    for said in ("summary", "source", "__doc__"):
        _hold(getattr(kind, said, None), f"{kind.__name__} has no {said}")
    for name, field in kind.model_fields.items():
        if name == "name":
            _hold(isinstance(field.default, str), f"{kind.__name__}.name has no default")
        else:
            _hold(field.description, f"{kind.__name__}.{name} has no description")


def check_stages(policy: Policy) -> None:
    """Check that a policy's answers cover each stage and never both evaluate and estimate.

    Raises:
        AssertionError: an answer has another shape or dtype, a stage is both evaluated and
            estimated, or the policy estimates without declaring it.
    """
    for steps, each in ((1, 1), (2, 1), (7, 1), (7, 2)):
        stages = steps * each
        noise_ratio = np.append(np.inf, np.logspace(2, -2, stages))[:stages]
        progress = np.repeat(np.arange(steps) / steps, each)
        known: dict[str, NDArray[np.bool_]] = {}
        for name, ask in (("evaluates", policy.evaluates), ("estimated", policy.estimated)):
            answer = known[name] = ask(noise_ratio, progress)
            _hold(
                answer.shape == (stages,) and answer.dtype == np.bool_,
                f"{policy!r}: {name} gives {answer.dtype} of shape {list(answer.shape)} "
                f"for {stages} stages, not one bool for each",
            )
        both = known["evaluates"] & known["estimated"]
        _hold(not both.any(), f"{policy!r} both evaluates and estimates stage {both.argmax()}")
        _hold(
            policy.estimates or not known["estimated"].any(),
            f"{policy!r} estimates, and its class does not say so by `estimates`",
        )


def check_filled_in(settings: Sequence[Policy], branches: int) -> None:
    """Check that branches and memory from ``fill`` have the shapes and dtype of its inputs.

    Inputs must not be modified, and results for a row must not depend on other rows. The same holds
    for the end of guidance, which only a policy that ``adapts`` may request.

    Args:
        settings: settings of one policy, with equal non-numeric fields.
        branches: number of branches of the rule.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    from torch import arange
    from torch import bool as yes_or_no

    kind, own = type(settings[0]), [*settings, *settings]
    rows = draw(len(own), branches=branches, slots=own[0].memory_slots(branches))
    # Evaluated in the first half of the rows, so that each setting is checked for both cases.
    evaluated = (arange(len(own)) < len(settings)).view(-1, 1, 1, 1)
    constants = draw(len(own), 1, None, 1, branches * kind.fitted).memory[:, :, :1, :1, :1]
    before = {field.name: getattr(rows, field.name).clone() for field in fields(rows)}
    together = _filled(own, rows, evaluated, constants)
    for name, kept in before.items():
        _hold(getattr(rows, name).equal(kept), f"{kind.__name__} writes into rows.{name}")
    for name, found, like in zip(
        ("others", "memory"), together[:2], (rows.others, rows.memory), strict=True
    ):
        _hold(
            found.shape == like.shape and found.dtype == like.dtype,
            f"{kind.__name__}: {name} is {list(found.shape)} of {found.dtype}, "
            f"not {list(like.shape)} of {like.dtype}",
        )
    ended = together[2]
    _hold(
        ended.shape == (len(own),) and ended.dtype == yes_or_no,
        f"{kind.__name__}: settled is {list(ended.shape)} of {ended.dtype}, "
        f"not one bool for each of {len(own)} rows",
    )
    _hold(
        kind.adapts or not ended.any(),
        f"{kind.__name__} ends guidance, and does not say so by `adapts`",
    )
    for i, policy in enumerate(own):
        row = slice(i, i + 1)
        alone = _filled(own[row], one_row(rows, i), evaluated[row], constants[row])
        for name, mine, its in zip(("others", "memory", "settled"), together, alone, strict=True):
            same = _same(mine[row].double(), its.double())
            _hold(same, f"{policy!r}: {name} depends on other rows")


def _filled(
    own: Sequence[Policy], rows: Rows, evaluated: Tensor, constants: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The branches that a policy fills in, its memory, and the rows whose guidance it ends."""
    kind = type(own[0])
    parameters = kind.parameters(own, rows.x[:1])
    told = {**parameters, "constants": constants}
    others, memory = kind.fill(rows, rows.memory, told, evaluated)
    return others, memory, kind.settled(rows, parameters)


def check_shapes(rule: Rule) -> None:
    """Check that results have the shapes and dtype of the inputs, and are finite.

    Raises:
        AssertionError: a shape or dtype differs, or a value is not finite.
    """
    from torch import float32, float64

    for kind in (float32, float64):
        rows = rows_for(rule, 3, dtype=kind)
        result = combine(rule, rows)
        for name, like in (("denoised", rows.cond), ("x", rows.x), ("memory", rows.memory)):
            found: Tensor = getattr(result, name)
            _hold(
                found.shape == like.shape and found.dtype == kind,
                f"{rule!r}: {name} is {list(found.shape)} of {found.dtype}, "
                f"not {list(like.shape)} of {kind}",
            )
            _hold(bool(found.isfinite().all()), f"{rule!r}: {name} is not finite")


def check_agreement(rule: Rule) -> None:
    """Check that where all predictions agree, they are the result and x does not move.

    Raises:
        AssertionError: the result or the point to step from differs.
    """
    rows = rows_for(rule, 3)
    # Small values, so that rules with a threshold do not clip them.
    cond = 0.01 * rows.cond
    others = cond[:, None].expand_as(rows.others)
    rows = replace(rows, cond=cond, others=others, memory=rows.memory * 0)
    result = combine(rule, rows)
    _hold(_same(result.denoised, cond), f"{rule!r} changes predictions that all agree")
    _hold(_same(result.x, rows.x), f"{rule!r} moves x where all predictions agree")


def check_branches(rule: Rule) -> None:
    """Check that each requested branch changes the result, and that no other branch does.

    Raises:
        AssertionError: a requested branch is not used, or a branch is used without being requested.
    """
    rows = rows_for(rule, 3)
    for k in range(rows.others.shape[1]):
        others = rows.others.clone()
        others[:, k] = rows_for(rule, 3, seed=1).others[:, k]
        first, second = combine(rule, rows), combine(rule, replace(rows, others=others))
        matters = not (first.denoised.equal(second.denoised) and first.x.equal(second.x))
        if rule.branches:
            _hold(matters, f"{rule!r} asks for branch {k} and does not use it")
        else:
            _hold(not matters, f"{rule!r} uses a branch that it does not ask for")
    if not rule.branches:
        result = combine(rule, rows)
        alone = _same(result.denoised, rows.cond) and _same(result.x, rows.x)
        _hold(alone, f"{rule!r} asks for no branch and changes the prompt's prediction")


def check_inputs_are_kept(rule: Rule) -> None:
    """Check that a rule does not modify its inputs, which others read as well.

    Raises:
        AssertionError: it writes into one of them.
    """
    rows = rows_for(rule, 2)
    before = {field.name: getattr(rows, field.name).clone() for field in fields(rows)}
    combine(rule, rows)
    for name, kept in before.items():
        _hold(getattr(rows, name).equal(kept), f"{rule!r} writes into rows.{name}")


def check_moves_open_a_step(rule: Rule) -> None:
    """Check that x moves only at the first evaluation of a step, as samplers require.

    Raises:
        AssertionError: x is moved where ``rows.opens_step`` is false.
    """
    rows = rows_for(rule, 2)
    within = combine(rule, replace(rows, opens_step=~rows.opens_step))
    _hold(within.x.equal(rows.x), f"{rule!r} moves x within a step, where opens_step is false")


def check_rows_are_independent(settings: Sequence[Rule]) -> None:
    """Check that rows with different parameters get the same results together as alone.

    Args:
        settings: settings of one rule, all with the same number of branches.

    Raises:
        AssertionError: the result of a row depends on other rows.
    """
    from torch import arange

    kind = type(settings[0])
    # Two rows for each, so that rows with equal parameters are covered too.
    own = [*settings, *settings]
    rows = rows_for(settings[0], len(own))
    odd = arange(len(own)).view(-1, 1, 1, 1) % 2 == 1
    rows = replace(rows, opens_step=odd, closes_step=~odd)
    together = kind.combine(rows, kind.parameters(own, rows.x[:1]))
    for i, rule in enumerate(own):
        alone = combine(rule, one_row(rows, i))
        for name in Guided._fields:
            mine: Tensor = getattr(together, name)[i : i + 1]
            _hold(_same(mine, getattr(alone, name)), f"{rule!r}: {name} depends on other rows")


def rows_for(rule: Rule, count: int, seed: int = 0, dtype: dtype | None = None) -> Rows:
    """Random rows with the branches and memory slots that a rule requests.

    If it requests no branch there is one, which must not affect the result.

    Args:
        rule: the rule, with its parameters.
        count: number of rows.
        seed: seed of the random numbers.
        dtype: dtype of the tensors; float64 by default.
    """
    return draw(count, seed, dtype, len(rule.branches) or 1, rule.memory_slots)


def draw(
    count: int, seed: int = 0, dtype: dtype | None = None, branches: int = 1, slots: int = 0
) -> Rows:
    """Random predictions at random variance-preserving levels in the second half of a run.

    Some rules do nothing at the start of a run.

    Args:
        count: number of rows.
        seed: seed of the random numbers.
        dtype: dtype of the tensors; float64 by default.
        branches: number of predictions of each row besides the prompt's, at least 1.
        slots: number of memory slots.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = torch.float64 if dtype is None else dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=kind)

    def uniform() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator, dtype=kind)

    sigma = uniform() * 0.98 + 0.01
    cond = normal(count, *SHAPE)
    yes = torch.ones(count, 1, 1, 1, dtype=torch.bool)
    return Rows(
        cond=cond,
        others=cond[:, None] + 0.3 * normal(count, branches, *SHAPE),
        x=normal(count, *SHAPE),
        alpha=(1 - sigma.square()).sqrt(),
        sigma=sigma,
        progress=(1 + uniform()) / 2,
        memory=normal(count, slots, *SHAPE),
        opens_step=yes,
        closes_step=yes.clone(),
    )


def one_row(rows: Rows, i: int) -> Rows:
    """Row i alone."""
    return Rows(**{field.name: getattr(rows, field.name)[i : i + 1] for field in fields(rows)})


def combine(rule: Rule, rows: Rows) -> Guided:
    """The result of a rule with the same parameters for all rows."""
    return rule.combine(rows, rule.parameters([rule] * len(rows.cond), rows.x[:1]))


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.allclose(wanted, rtol=CLOSE, atol=CLOSE)


def _hold(promise: object, broken: str) -> None:
    if not promise:
        raise AssertionError(broken)
