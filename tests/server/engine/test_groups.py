"""Images of one group: particles that are resampled, and images that keep apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidance import FeynmanKac, NegToMe
from guidance.always import Always
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.edits import ApartFrom
from guidance.unguided import Unguided
from samplers import Sampler, preconditioning
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from server.engine.engine import Engine
from server.engine.state.noise import stage_noise, stage_uniform, start_noise
from server.engine.state.submission import Submission
from server.engine.task import Group
from server.engine.tick.preview import to_uint8
from server.errors import Cancelled, RowFailed
from tests.server.by_hand import Asked, terms_for
from tests.server.toy_model import SCHEDULE, SIDE, Ear, Neighbourly, Toy, run, started

SHAPE = (4, SIDE // 8, SIDE // 8)
STEPS = 6


@pytest.fixture(scope="module")
def model() -> Neighbourly:
    return Neighbourly()


@pytest.fixture(scope="module")
def engine(model: Neighbourly) -> Iterator[Engine]:
    made = started(model, 24)
    yield made
    made.stop(0)


@pytest.fixture(scope="module")
def fixed_engine(model: Neighbourly) -> Iterator[Engine]:
    made = started(model, 24, deterministic=True)
    yield made
    made.stop(0)


def tasks_of(
    settings: tuple[Any, ...],
    count: int,
    sampler: Sampler | None = None,
    group: Group | None = None,
    **fields: Any,
) -> list[Asked]:
    """Images that form a group if the request makes them depend on each other."""
    solver = sampler or DDIM(eta=1)
    plan = solver.plan(SCHEDULE.grid(solver.default_spacing, STEPS))
    given: dict[str, Any] = {
        "prompt": "a circle",
        "negative_prompt": "blue",
        "rule": CFG(scale=3.0),
        "policy": Always(),
        **fields,
    }
    together = any(isinstance(one, FeynmanKac | NegToMe) for one in settings)
    run = {name: given[name] for name in ("rule", "prompt", "negative_prompt")}
    own: dict[str, Any] = {
        "group": group or (Group() if together else None),
        "terms": terms_for(settings, plan, **run),
        "settings": settings,
    }
    return [
        Asked(model="toy", width=SIDE, height=SIDE, plan=plan, seed=20 + k, **own, **given)
        for k in range(count)
    ]


def pixels(ear: Ear, count: int) -> list[NDArray[np.uint8]]:
    assert not ear.errors, ear.errors
    return [ear.results[i].pixels for i in range(count)]


class ByHand:
    """The images of a group, computed by hand in their own batch, stage by stage."""

    def __init__(self, model: Toy, tasks: list[Asked]) -> None:
        self.model, self.tasks, self.plan = model, tasks, tasks[0].plan
        self.scales = preconditioning("epsilon", self.plan.alpha[:-1], self.plan.sigma[:-1])
        self.times = SCHEDULE.conditioning(self.plan.t[:-1])
        self.ancestors = list(range(len(tasks)))
        self.effective: list[float] = []

    def pixels(self) -> list[NDArray[np.uint8]]:
        state = torch.zeros(len(self.tasks), self.plan.slots, *SHAPE)
        starts = [start_noise(task.seed, SHAPE) for task in self.tasks]
        state[:, 0] = self.plan.start_scale * torch.stack(starts)
        for i in range(STEPS):
            cond, other = self.predictions(i, state[:, 0])
            guided = cond + 2.0 * (cond - other)
            noise = torch.stack([stage_noise(task.seed, i, SHAPE) for task in self.tasks])
            ones = torch.ones_like(noise)
            columns = torch.cat([state, torch.stack([guided, noise, ones], 1)], 1)
            matrix = torch.tensor(self.plan.tables[i], dtype=torch.float32)
            state = torch.einsum("kj,njchw->nkchw", matrix, columns)
            for one in self.tasks[0].settings:
                if isinstance(one, FeynmanKac) and i + 1 < STEPS:
                    state = state[self.drawn(i, cond - other, one.bound)]
        return list(to_uint8(self.model.decode(state[:, 0])).numpy())

    def predictions(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        count, settings = len(self.tasks), self.tasks[0].settings
        apart = next((one for one in settings if isinstance(one, NegToMe)), None)
        t = torch.full((count,), float(self.times[i]))
        found = []
        for text in (self.tasks[0].prompt_text, self.tasks[0].negative_prompt):
            inputs = self.model.inputs([text] * count)
            if apart is not None and i / STEPS < apart.stop:
                push = ApartFrom(apart.layers, apart.strength, apart.threshold, 0)
                inputs = replace(inputs, edits=[(), *[(push,)] * (count - 1)])
            raw = self.model.evaluate(float(self.scales.scale_in[i]) * x, t, inputs)
            found.append(float(self.scales.skip[i]) * x + float(self.scales.out[i]) * raw)
        return found[0], found[1]

    def drawn(self, i: int, apart: Tensor, bound: float) -> list[int]:
        """Weights and systematic resampling, written out as in the paper."""
        snr = (self.plan.alpha[i : i + 2] / self.plan.sigma[i : i + 2]) ** 2
        distance = apart.double().square().sum((1, 2, 3))
        gained = 3.0 * 2.0 / 2 * distance * (snr[1] - snr[0])
        centred = (gained - gained.mean()).clamp(-bound, bound)
        shares = centred.softmax(0)
        self.effective.append(float(1 / shares.square().sum()))
        count, uniform = len(shares), stage_uniform(self.tasks[0].seed, i)
        chosen = [
            next(k for k in range(count) if shares[: k + 1].sum() > (uniform + j) / count)
            for j in range(count)
        ]
        surplus = [k for k in sorted(set(chosen)) for _ in range(chosen.count(k) - 1)]
        origins = [k if k in chosen else surplus.pop(0) for k in range(count)]
        self.ancestors = [self.ancestors[k] for k in origins]
        return origins


SAMPLERS = [DDIM(eta=1), DPMSolverPP(variant="sde")]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("bound", [1.0, 1e6])
def test_particles_are_what_a_loop_of_their_own_gives(
    engine: Engine, model: Toy, sampler: Sampler, bound: float
) -> None:
    tasks = tasks_of((FeynmanKac(bound=bound),), 5, sampler)
    by_hand = ByHand(model, tasks)
    expected = by_hand.pixels()
    ear = run(engine, tasks)
    for ours, theirs in zip(pixels(ear, 5), expected, strict=True):
        assert int(np.abs(ours.astype(int) - theirs.astype(int)).max()) <= 2
    assert [ear.results[i].ancestor for i in range(5)] == by_hand.ancestors
    assert len(set(by_hand.ancestors)) < 5
    for result in ear.results.values():
        assert result.effective == pytest.approx(by_hand.effective, rel=1e-3)
        assert result.evaluations == 2 * STEPS


def test_particles_that_weigh_alike_are_left_alone(engine: Engine) -> None:
    same = pixels(run(engine, tasks_of((FeynmanKac(bound=1e-9),), 4)), 4)
    alone = pixels(run(engine, tasks_of((), 4)), 4)
    assert all(np.array_equal(a, b) for a, b in zip(same, alone, strict=True))


@pytest.mark.parametrize(
    "settings", [(FeynmanKac(),), (NegToMe(stop=0.6),)], ids=["fkc", "negtome"]
)
def test_a_group_is_bit_identical_alone_and_in_company(
    fixed_engine: Engine, settings: tuple[Any, ...]
) -> None:
    tasks = tasks_of(settings, 3)
    alone = pixels(run(fixed_engine, tasks), 3)
    company = [
        *tasks_of((NegToMe(stop=1.0),), 3, DPMSolverPP(), prompt="a star"),
        *tasks_of((Autoguidance(),), 2),
        *tasks,
        *tasks_of((FeynmanKac(),), 2, rule=CFG(scale=7.0)),
        *tasks_of((), 1, rule=Unguided()),
    ]
    ear = run(fixed_engine, company)
    assert not ear.errors
    ours = [ear.results[i].pixels for i in (5, 6, 7)]
    assert all(np.array_equal(a, b) for a, b in zip(ours, alone, strict=True))
    lines = [ear.results[i].ancestor for i in (5, 6, 7)]
    assert set(lines) <= {5, 6, 7}


def test_a_particle_that_breaks_goes_on_from_another(engine: Engine) -> None:
    tasks = tasks_of((FeynmanKac(),), 3)
    broken = torch.full((3, SIDE, SIDE), torch.nan)
    tasks[1] = tasks_of(tasks[0].settings, 2, group=tasks[0].group, image=broken)[1]
    ear = run(engine, tasks)
    assert not ear.errors
    assert ear.results[1].ancestor in (0, 2)
    assert all(np.ptp(ear.results[i].pixels) > 0 for i in range(3))


def test_particles_that_all_break_fail(engine: Engine) -> None:
    broken = torch.full((3, SIDE, SIDE), torch.nan)
    ear = run(engine, tasks_of((FeynmanKac(),), 2, image=broken))
    assert [type(error) for error in ear.errors.values()] == [RowFailed, RowFailed]


def test_images_keep_apart_from_the_first_in_every_prediction(engine: Engine, model: Toy) -> None:
    tasks = tasks_of((NegToMe(stop=0.5),), 4)
    expected = ByHand(model, tasks).pixels()
    plain = pixels(run(engine, tasks_of((), 4)), 4)
    company = [*tasks_of((Autoguidance(),), 2), *tasks]
    ear = run(engine, company)
    assert not ear.errors
    ours = [ear.results[i].pixels for i in range(2, 6)]
    for mine, theirs in zip(ours, expected, strict=True):
        assert int(np.abs(mine.astype(int) - theirs.astype(int)).max()) <= 2
    apart = [
        int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(ours, plain, strict=True)
    ]
    assert apart[0] <= 2
    assert min(apart[1:]) > 5
    assert ear.results[3].evaluations == 2 * STEPS


def test_without_the_first_image_the_others_keep_apart_from_the_next(engine: Engine) -> None:
    apart, group = (NegToMe(stop=1.0),), Group()
    broken = torch.full((3, SIDE, SIDE), torch.nan)
    ear = run(
        engine,
        [
            *tasks_of(apart, 1, group=group, image=broken),
            *tasks_of(apart, 4, group=group)[1:],
        ],
    )
    assert list(ear.errors) == [0]
    assert isinstance(ear.errors[0], RowFailed)
    plain = pixels(run(engine, tasks_of((), 4)), 4)
    apart = [
        int(np.abs(ear.results[i].pixels.astype(int) - plain[i].astype(int)).max())
        for i in (1, 2, 3)
    ]
    assert apart[0] <= 2
    assert min(apart[1:]) > 5


def test_cancelling_ends_every_image_of_a_group(engine: Engine) -> None:
    tasks = tasks_of((FeynmanKac(),), 4)
    submissions: list[Submission] = []
    submitted = Event()

    class Cancelling(Ear):
        def progress(self, index: int, step: int, steps: int, preview: object) -> None:
            assert submitted.wait(60)
            submissions[0].cancel()

    ear = Cancelling(4)
    submissions.append(engine.submit(tasks, ear))
    submitted.set()
    ear.wait()
    kinds = {type(error) for error in ear.errors.values()}
    assert kinds == {Cancelled}
    assert not ear.results


def test_the_draw_is_of_the_seed_and_the_stage_and_spread_evenly() -> None:
    drawn = np.array([stage_uniform(seed, stage) for seed in range(50) for stage in range(40)])
    assert len(set(drawn)) == 2000
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts, _ = np.histogram(drawn, 10, (0, 1))
    assert (abs(counts - 200) < 60).all()
    assert stage_uniform(3, 4) == stage_uniform(3, 4)
