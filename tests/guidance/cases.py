"""Rows of random predictions, and every rule and policy at many parameters."""

from dataclasses import replace
from itertools import product
from typing import Any, Literal, get_args, get_origin

import torch
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from guidance import PERTURBATIONS, POLICIES, RULES, Perturbation, Policy, Rows, Rule
from guidance.composed import Composed, WeightedPrompt
from guidance.testing import SHAPE as SHAPE
from guidance.testing import combine
from guidance.testing import draw as draw
from guidance.testing import one_row as one_row
from tests.covering import covering

apply = combine


def with_memory(rows: Rows, slots: int, seed: int = 1) -> Rows:
    """The same rows in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows.cond), slots, *SHAPE)
    memory = torch.randn(shape, generator=generator, dtype=rows.cond.dtype)
    return replace(rows, memory=memory)


def with_other(rows: Rows, other: Tensor) -> Rows:
    """The same rows with this prediction as their only branch."""
    return replace(rows, others=other[:, None])


def _values(field: FieldInfo) -> list[Any]:
    if get_origin(field.annotation) is Literal:
        return list(get_args(field.annotation))
    bounds = [b.ge if isinstance(b, Ge) else b.le for b in field.metadata if isinstance(b, Ge | Le)]
    neutral = [1.0, 0.0]
    return list(dict.fromkeys([field.default, *bounds, *neutral]))


def _variants(kind: type[BaseModel]) -> list[Any]:
    """Settings that cover every compatible pair of values of a kind's fields."""
    names = list(kind.model_fields)
    found: list[Any] = []
    for values in product(*(_values(field) for field in kind.model_fields.values())):
        try:
            found.append(kind.model_validate(dict(zip(names, values, strict=True))))
        except ValidationError:
            continue
    return covering(found, lambda one: [repr(value) for _, value in one], together=2)


def label(setting: BaseModel) -> str:
    """A short name for test reports."""
    return "-".join(
        f"{value:g}" if isinstance(value, float) else str(value) for _, value in setting
    )


WEIGHTS = ((2.5,), (0.0,), (-1.0, 3.0))
COMPOSED: list[Rule] = [
    Composed(scale=scale, prompts=tuple(WeightedPrompt(prompt="x", weight=w) for w in weights))
    for scale in (4.0, 1.0, 0.0)
    for weights in WEIGHTS
]
RULE_VARIANTS: list[Rule] = [one for kind in RULES for one in _variants(kind)] + COMPOSED
POLICY_VARIANTS: list[Policy] = [one for kind in POLICIES for one in _variants(kind)]
PERTURBATION_VARIANTS: list[Perturbation] = [
    one for kind in PERTURBATIONS for one in _variants(kind)
]


def _number(field: FieldInfo) -> st.SearchStrategy[float]:
    low, high, options = -10.0, 10.0, {"exclude_min": False, "exclude_max": False}
    for bound in field.metadata:
        if isinstance(bound, Ge | Gt):
            low: Any = bound.ge if isinstance(bound, Ge) else bound.gt
            options["exclude_min"] = isinstance(bound, Gt)
        elif isinstance(bound, Le | Lt):
            high: Any = bound.le if isinstance(bound, Le) else bound.lt
            options["exclude_max"] = isinstance(bound, Lt)
    return st.floats(low, high, width=32, **options)


def _any(field: FieldInfo) -> st.SearchStrategy[Any]:
    if get_origin(field.annotation) is Literal:
        return st.sampled_from(get_args(field.annotation))
    if get_origin(field.annotation) is tuple:
        weight = _number(WeightedPrompt.model_fields["weight"])
        prompt = st.builds(WeightedPrompt, prompt=st.just("x"), weight=weight)
        return st.lists(prompt, max_size=3)
    return _number(field)


def settings_of(kind: type[Rule]) -> st.SearchStrategy[Rule]:
    """Any parameters that a rule allows."""
    fields = {name: _any(field) for name, field in kind.model_fields.items()}
    return st.fixed_dictionaries(fields).map(kind.model_validate)
