"""Conventions of few-step models are as documented, and runs can be built for each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from samplers import NoiseSchedule
from server.models.conventions import CONVENTIONS, Convention, defaults_by, numbers

DOCUMENT = (Path(__file__).parents[3] / "docs/families.md").read_text("utf-8")
NOISE = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"})


def test_each_number_of_steps_takes_as_many_evaluations() -> None:
    for name, one in CONVENTIONS.items():
        schedule = NoiseSchedule.flow(3.0) if one.flow else NOISE
        assert one.steps in one.counts or not one.counts, name
        for count in one.counts or (1, 4, 16):
            own = defaults_by(name, "", steps=count)
            plan = own.sampler.plan(schedule.grid(own.spacing_of(count), count))
            assert plan.evaluations == count, name
            if count > 1:
                # Models of one step start lower; all others start from pure noise.
                assert plan.t[0] == schedule.t_start, name


@pytest.mark.parametrize("name", ["dmd2", "hyper"])
def test_weights_of_one_step_are_sampled_otherwise_and_take_other_numbers_all_the_same(
    name: str,
) -> None:
    one, four = defaults_by(name, "", steps=1), defaults_by(name, "", steps=4)
    assert one.sampler.name == "lcm"
    assert one.spacing_of(None).own_steps == one.spacing_of(1).own_steps == 1
    assert one.spacing_of(4) == four.spacing_of(1) == four.spacing
    assert (one.counts, four.counts) == ((1,), (4,))


def test_numbers_of_steps_are_said_in_words() -> None:
    said = [numbers(counts) for counts in ((4,), (1, 4), (1, 2, 3, 4), (1, 2, 4, 8))]
    assert said == ["4", "1 or 4", "1 to 4", "1, 2, 4 or 8"]


def written(one: BaseModel) -> str:
    fields: dict[str, Any] = one.model_dump(mode="json", exclude_defaults=True)
    name = one.model_dump()["name"]
    return f"`{json.dumps({'name': name} | fields)}`" if fields else f"`{name}`"


def row(name: str, one: Convention) -> str:
    guidance = written(one.rule)
    beside: dict[str, Any] = {"policy": one.policy.name} if one.policy.embeds else {}
    if one.cfg_norm is not None:
        beside["cfg_norm"] = one.cfg_norm.model_dump(mode="json", exclude_defaults=True)
    if beside:
        fields = one.rule.model_dump(mode="json", exclude_defaults=True)
        guidance = f"`{json.dumps({'name': one.rule.name, **fields, **beside})}`"
    sampler, spacing = written(one.sampler), written(one.spacing)
    if one.one_step is not None:
        sampler += f"; 1 step: {written(one.one_step[0])}"
        spacing += f"; 1 step: {written(one.one_step[1])}"
    steps = numbers(one.counts) if one.counts else "any"
    if one.weights_of_counts:
        steps += ", as the weights are for"
    elif len(one.counts) != 1:
        steps += f", by default {one.steps}"
    cells = (f"`{name}`", one.models, sampler, spacing, steps, guidance, one.source)
    return f"| {' | '.join(cells)} |"


def test_the_document_has_the_table_as_it_is() -> None:
    head = "| convention | models | `sampler` | `spacing` | `steps` | `guidance` | source |"
    rows = [head, "|---|---|---|---|---|---|---|", *map(row, CONVENTIONS, CONVENTIONS.values())]
    table = "\n".join(rows)
    assert f"\n\n{table}\n\n" in DOCUMENT, table
