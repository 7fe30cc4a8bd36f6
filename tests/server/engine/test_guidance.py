"""Guidance in the engine on a toy model: whole runs compared with runs by hand, and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from guidance import PERTURBATIONS, Perturbation, SkipTuning
from guidance.adaptive import Adaptive
from guidance.always import Always
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.composed import Composed, WeightedPrompt
from guidance.embedded import Embedded
from guidance.interval import Interval
from guidance.linear_adaptive import LinearAdaptive
from guidance.pag import PAG
from guidance.residual import Residual
from guidance.reuse import Reuse
from guidance.seg import SEG
from guidance.slg import SLG
from guidance.unguided import Unguided
from samplers import Sampler
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.heun import Heun
from server.engine.engine import Engine
from server.engine.guidance_plan import plan_guidance
from server.engine.state.noise import start_noise
from server.engine.task import Group
from server.engine.tick.preview import to_uint8
from server.errors import InvalidRequest, RowFailed
from tests.covering import EVERY_CELL
from tests.server.by_hand import TOGETHER, Asked, ByHand, task
from tests.server.toy_model import SCHEDULE, SIDE, Toy, run, started

HALF = Interval(low=0, high=1e9, start=0.5)


def by_hand(model: Toy, task: Asked) -> NDArray[np.uint8]:
    return ByHand(model, task).pixels()


@pytest.fixture(scope="module")
def model() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def engine(model: Toy) -> Iterator[Engine]:
    made = started(model, 16)
    yield made
    made.stop(0)


@pytest.fixture
def narrow(model: Toy) -> Iterator[Engine]:
    """An engine whose ticks take as many rows as fit; others take the cheapest number."""
    made = started(model, 4, deterministic=True)
    yield made
    made.stop(0)


def name(kind: type[Any]) -> str:
    return kind.model_fields["name"].default


# A step with a history, one of two stages, and one that draws noise.
SOLVERS: list[Sampler] = [DPMSolverPP(), Heun(), DDIM(eta=1.0)]


@pytest.mark.parametrize("turn", range(3) if EVERY_CELL else [0])
def test_any_mix_of_guidance_in_one_batch_is_what_each_image_is_by_hand(
    engine: Engine, model: Toy, turn: int
) -> None:
    """All rules with all policies at once, half of them with perturbations and skip-tuning."""
    terms = [
        (),
        (PAG(),),
        (SEG(scale=1, start=0.3), SLG(start=0, stop=0.5), Autoguidance(scale=0.2)),
    ]
    tasks = [
        task(
            rule,
            policy,
            (*terms[k % 3], *([SkipTuning(bottom=0.5)] * (k % 2))),
            sampler=SOLVERS[(k // 3 + turn) % 3],
            steps=5,
            seed=k,
        )
        for k, (rule, policy) in enumerate(TOGETHER)
    ]
    with pytest.MonkeyPatch.context() as patch:
        # This call waits for the device, which a tick may do only once, at its end.
        patch.setattr(torch.Tensor, "new_tensor", None)
        ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    for k, one in enumerate(tasks):
        expected = by_hand(model, one).astype(int)
        assert np.abs(ear.results[k].pixels - expected).max() <= 2, (one.rule, one.policy)


@pytest.mark.parametrize("kind", PERTURBATIONS, ids=name)
def test_a_perturbation_changes_the_picture(engine: Engine, kind: type[Perturbation]) -> None:
    term = kind.model_validate({"scale": 3, "start": 0, "stop": 1})
    plain, disturbed, none = (
        run(engine, [task(settings=terms)]).results[0].pixels
        for terms in ((), (term,), (term.model_copy(update={"scale": 0.0}),))
    )
    assert not np.array_equal(plain, disturbed)
    assert np.array_equal(plain, none)


def test_strength_is_the_scale_whether_or_not_there_is_cfg(engine: Engine, model: Toy) -> None:
    """In other programs, scale s without CFG has the strength that s - 1 has with it."""
    alone = task(Unguided(), settings=(PAG(scale=1.5),), steps=1)
    beside = task(CFG(scale=1.0), settings=(PAG(scale=1.5),), steps=1)
    ear = run(engine, [alone, beside])
    assert np.array_equal(ear.results[0].pixels, ear.results[1].pixels)
    assert np.abs(ear.results[0].pixels - by_hand(model, alone).astype(int)).max() <= 1


def test_a_strength_that_falls_to_nothing_ends_the_evaluations(engine: Engine, model: Toy) -> None:
    one = task(settings=(PAG(scale=1.5, adaptive_scale=0.003), SEG(stop=0.5)))
    [falling, _] = one.terms
    acting = [falling.acts(stage) for stage in range(6)]
    assert acting == sorted(acting, reverse=True)
    assert 0 < sum(acting) < 6
    result = run(engine, [one]).results[0]
    assert result.evaluations == 12 + sum(acting) + 3
    assert np.abs(result.pixels - by_hand(model, one).astype(int)).max() <= 1


TWO = Composed(prompts=(WeightedPrompt(prompt="a star"),))

COSTS = {
    "cfg": (task(), 12, 0),
    "scale 1": (task(CFG(scale=1.0)), 6, 0),
    "none": (task(Unguided()), 6, 0),
    "interval": (task(policy=HALF), 9, 3),
    "adaptive at once": (task(policy=Adaptive(threshold=-1.0)), 7, 5),
    "adaptive never": (task(policy=Adaptive(threshold=1.0)), 12, 0),
    "reuse": (task(policy=Reuse(every=3)), 8, 4),
    "reuse in steps of two": (task(policy=Reuse(every=2), sampler=Heun(), steps=4), 11, 3),
    "linear": (task(policy=LinearAdaptive(), steps=8), 10, 6),
    "residual self": (task(policy=Residual()), 6, 6),
    "residual onetime": (task(policy=Residual(mode="onetime")), 7, 5),
    "embedded": (task(policy=Embedded()), 6, 6),
    "embedded at scale 1": (task(CFG(scale=1.0), Embedded()), 6, 0),
    "perturbed": (task(settings=(PAG(),)), 18, 0),
    "perturbed alone": (task(Unguided(), settings=(PAG(),)), 12, 0),
    "perturbed by nothing": (task(settings=(PAG(scale=0.0),)), 12, 0),
    "perturbed for a while": (task(settings=(PAG(start=0.5), SLG(start=0, stop=0.3))), 17, 0),
    "perturbed when settled": (task(policy=Adaptive(threshold=-1.0), settings=(PAG(),)), 13, 5),
    "weak companion": (task(settings=(Autoguidance(),)), 18, 0),
    "two branches": (task(TWO), 18, 0),
    "two branches reused": (task(TWO, Reuse()), 12, 6),
    "two branches in an interval": (task(TWO, HALF), 12, 6),
    "two branches that agree": (task(TWO, Adaptive(threshold=-1.0)), 8, 10),
    "all at once": (task(TWO, HALF, (PAG(), SEG(stop=0.5))), 12 + 9, 6),
}
FREEING = (
    *("interval", "adaptive at once", "reuse", "perturbed for a while", "two branches that agree"),
    "perturbed",
)
"""One for each way in which a run frees rows, and one that uses all of them to the end."""


@pytest.mark.parametrize("kind", COSTS)
def test_evaluations_are_spent_and_saved_as_the_table_says(engine: Engine, kind: str) -> None:
    one, spent, saved = COSTS[kind]
    before = engine.measurements.evaluations, engine.measurements.saved[one.policy.name]
    result = run(engine, [one]).results[0]
    assert (result.evaluations, result.saved) == (spent, saved)
    assert engine.measurements.evaluations - before[0] == spent
    assert engine.measurements.saved[one.policy.name] - before[1] == saved
    planned = plan_guidance(one)
    settles = isinstance(one.policy, Adaptive) and saved > 0
    later = (planned.left_settled if settles else planned.left)[1]
    assert planned.left[0] - planned.left[1] + later == spent, "what it is known to cost before"
    assert spent + saved == one.plan.evaluations * (1 + len(one.rule.branches)) + sum(
        int(
            p.evaluates(
                one.plan.sigma[:-1] / one.plan.alpha[:-1], np.array(one.plan.step) / 6
            ).sum()
        )
        for p in one.settings
        if isinstance(p, Perturbation)
    )


@pytest.mark.parametrize("kind", COSTS if EVERY_CELL else FREEING)
def test_freed_rows_serve_others_in_the_same_tick(narrow: Engine, kind: str) -> None:
    """Four images share four rows: rows that one does not need are taken by the next."""
    one, spent, _ = COSTS[kind]
    others = [task(Unguided(), steps=30, seed=k) for k in range(3)]
    run(narrow, [one, *others])
    ticks, rows = narrow.measurements.ticks, narrow.measurements.rows_per_tick
    # While that image runs, no tick has spare room; afterwards only three rows are left.
    full = sum(count for size, count in rows.items() if size == 4)
    assert full >= one.plan.evaluations
    assert sum(size * count for size, count in rows.items()) == spent + 3 * 30
    assert ticks == sum(rows.values())


def test_an_image_that_no_tick_could_hold_is_refused(narrow: Engine) -> None:
    wide = task(TWO, settings=(PAG(), SEG()))
    sentence = (
        "guidance needs 5 rows of a forward pass at once; at most 4 are allowed here, "
        "so ask for fewer branches or perturbations."
    )
    with pytest.raises(InvalidRequest) as refusal:
        narrow.submit([wide], None)  # type: ignore[arg-type]
    assert refusal.value.message == sentence
    assert refusal.value.field == "guidance"
    assert narrow.measurements.pending == 0


def test_a_group_runs_in_lockstep_whatever_its_images_save(engine: Engine) -> None:
    group = Group()
    policies = [Always(), Adaptive(threshold=-1.0), HALF]
    members = [task(policy=p, group=group, seed=k, steps=5) for k, p in enumerate(policies)]
    strangers = [task(seed=k, steps=5) for k in range(8)]
    ear = run(engine, [*strangers[:4], *members, *strangers[4:]])
    assert not ear.errors
    steps = [(index, step) for index, step in ear.steps if 4 <= index < 7]
    assert [step for _, step in steps] == [step for step in range(1, 6) for _ in members]
    assert [ear.results[k].saved for k in (4, 5, 6)] == [0, 4, 3]


def test_a_group_larger_than_what_a_tick_admits_comes_in_whole(model: Toy) -> None:
    engine = started(model, 64)
    try:
        group = Group()
        ear = run(engine, [task(Unguided(), group=group, seed=k, steps=3) for k in range(40)])
        assert [step for _, step in ear.steps] == [1] * 40 + [2] * 40 + [3] * 40
    finally:
        engine.stop(0)


def test_a_group_that_no_tick_could_hold_is_refused(narrow: Engine) -> None:
    group = Group()
    with pytest.raises(
        InvalidRequest, match="6 rows of a forward pass at once for the 3 images of its"
    ):
        narrow.submit([task(group=group) for _ in range(3)], None)  # type: ignore[arg-type]


class Explosive(CFG, frozen=True):
    name: Any = "explosive"

    @classmethod
    def combine(cls, rows: Any, parameters: Any) -> Any:
        raise ValueError("boom")


def test_an_error_in_a_group_ends_that_group_alone_and_never_splits_it(engine: Engine) -> None:
    group, doomed = Group(), Group()
    sound = [task(group=group, seed=k) for k in range(2)]
    broken = [task(Explosive() if k else None, group=doomed, seed=k) for k in range(2)]
    ear = run(engine, [task(seed=9), *broken, *sound])
    assert sorted(ear.errors) == [1, 2]
    assert all("'explosive' failed with" in str(error) for error in ear.errors.values())
    assert [step for index, step in ear.steps if index > 2] == [
        k for k in range(1, 7) for _ in (0, 1)
    ]


def test_a_policy_that_cannot_serve_a_rule_is_an_error() -> None:
    one = task(TWO, Residual())
    with pytest.raises(ValueError, match="supports at most 1 second prediction, but the rule"):
        plan_guidance(one)


def test_a_rule_at_which_nothing_is_combined_needs_no_coefficients(engine: Engine) -> None:
    one = replace(task(CFG(scale=1.0), LinearAdaptive()), coefficients=None)
    assert run(engine, [one]).results[0].evaluations == 6


def test_the_picture_that_a_run_starts_from_is_the_reference_of_residual_guidance(
    engine: Engine, model: Toy
) -> None:
    picture = torch.rand(3, SIDE, SIDE) * 2 - 1
    policy = Residual()
    one = task(policy=policy, sampler=DDIM(), steps=1, image=picture)
    [x0] = model.encode_image(picture[None])
    plan = one.plan
    x = float(plan.alpha[0]) * x0 + float(plan.sigma[0]) * start_noise(3, x0.shape)
    told = model.inputs(["a circle"])
    t = torch.tensor(SCHEDULE.conditioning(plan.t[:1]), dtype=torch.float32)
    eps = model.evaluate(x[None], t, told)[0]
    cond = (x - float(plan.sigma[0]) * eps) / float(plan.alpha[0])
    expected = to_uint8(model.decode((x0 + 4 * (cond - x0))[None]))[0].numpy().astype(int)
    assert np.abs(run(engine, [one]).results[0].pixels - expected).max() <= 1


def test_a_nan_in_a_policys_memory_ends_its_own_image_alone(engine: Engine) -> None:
    poisoned = task(policy=Residual(), image=torch.full((3, SIDE, SIDE), torch.nan))
    ear = run(engine, [task(), poisoned, task(policy=Reuse())])
    assert list(ear.errors) == [1]
    assert isinstance(ear.errors[1], RowFailed)
