"""Step caches in the engine equal the authors' loop, and diffusers' pipeline with that loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from guidance import CFG, NAG, PAG, Adaptive, EasyCache, Edit, Interval
from guidance.apg import APG
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.reuse import Reuse
from guidance.step_cache import Decision
from guidance.unguided import Unguided
from samplers import Plan
from samplers.ddim import DDIM
from samplers.heun import Heun
from server.engine.client import Client
from server.engine.engine import Engine
from server.engine.state.batch import Batch
from server.engine.state.noise import start_noise
from server.engine.state.sequence import ImageResult, Sequence
from server.engine.state.submission import Submission
from server.engine.task import ImageTask
from server.engine.tick import recall
from server.engine.tick.preview import to_uint8
from server.engine.tick.weave import Evaluated
from server.errors import Cancelled
from server.models.controls.control import Control, ControlUse
from server.models.image_prompts.image_prompt import UNLOADED, ImagePromptUse
from server.models.inputs import RowInputs
from tests.server.by_hand import Asked, ByHand
from tests.server.by_hand import task as toy_task
from tests.server.toy_model import SCHEDULE, SIDE, Ear, Toy, run, started

EASY = EasyCache(threshold=0.5, start=0.1)
STEPS = 20


class AuthorsLoop(ByHand):
    """Calls the network as ``easycache_forward_`` of the authors' EasyCache4Wan2.2 does.

    The prompt's call decides for the other calls of its stage. Theirs are the same at every stage.
    Here, a stage that has a call which the last evaluated stage had not is evaluated, too.
    """

    def __init__(self, model: Toy, task: Asked) -> None:
        super().__init__(model, task)
        assert isinstance(task.cache, EasyCache)
        self.cache = task.cache
        self.k: float | None = None
        self.accumulated_error = 0.0
        self.previous_raw_input: Tensor | None = None
        self.prev_prev_raw_input: Tensor | None = None
        self.previous_raw_output: Tensor | None = None
        self.differences: dict[Any, Tensor] = {}
        self.should_calc = True
        self.spent = self.saved = 0

    def denoised(self, i: int, x: Tensor, text: str | None, *edits: Edit) -> Tensor:
        """Their networks predict the velocity ``(alpha x - D) / sigma``; the toy predicts noise."""
        alpha, sigma = float(self.plan.alpha[i]), float(self.plan.sigma[i])
        raw_input, key = x.clone(), (text, edits)
        of_prompt = key == (self.task.prompt_text, ())
        if of_prompt:
            self.should_calc = self.decides(i, raw_input)
            if self.should_calc:
                self.differences = {}
            self.previous_raw_input = raw_input
        if not self.should_calc:
            self.saved += 1
            return alpha * x - sigma * (raw_input + self.differences[key])
        self.spent += 1
        denoised = super().denoised(i, x, text, *edits)
        output = (alpha * x - denoised) / sigma
        if of_prompt:
            if self.previous_raw_output is not None:
                output_change = (output - self.previous_raw_output).abs().mean()
                assert self.prev_prev_raw_input is not None
                self.k = float(output_change / (raw_input - self.prev_prev_raw_input).abs().mean())
            self.prev_prev_raw_input, self.previous_raw_output = raw_input, output
        self.differences[key] = output - raw_input
        return denoised

    def decides(self, i: int, raw_input: Tensor) -> bool:
        inside = self.cache.start <= self.progress[i] < self.cache.stop
        known = self.differences.keys() >= self.asks(i)
        if not inside or not known or self.k is None or i == self.plan.evaluations - 1:
            self.accumulated_error = 0
            return True
        assert self.previous_raw_input is not None
        assert self.previous_raw_output is not None
        change = (raw_input - self.previous_raw_input).abs().mean()
        self.accumulated_error += self.k * float(change / self.previous_raw_output.abs().mean())
        if self.accumulated_error < self.cache.threshold:
            return False
        self.accumulated_error = 0
        return True

    def asks(self, i: int) -> set[Any]:
        task = self.task
        asked: set[Any] = {(task.prompt_text, ())}
        if not self.settled and self.evaluated[i]:
            told = task.prompt_text, task.negative_prompt
            asked |= {(branch.text(*told), ()) for branch in task.rule.branches}
        for term in self.perturbed:
            if term.evaluates(self.ratio[i : i + 1], self.progress[i : i + 1])[0]:
                asked.add((task.prompt_text, (term.edit,)))
        return asked


class Timed(Toy):
    """A toy that records the times at which it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        self.times.append(float(t[0]))
        return super().evaluate(x, t, inputs)


class Twin(Toy):
    """A toy that predicts the velocity, or the equivalent noise."""

    def __init__(self, *, noise: bool, plan: Plan) -> None:
        super().__init__(prediction="epsilon" if noise else "v_prediction")
        times = SCHEDULE.conditioning(plan.t[:-1]).astype(np.float32).tolist()
        self.levels = dict(zip(times, zip(plan.alpha, plan.sigma, strict=False), strict=False))
        self.noise = noise

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        velocity = super().evaluate(x, t, inputs)
        alpha, sigma = self.levels[float(t[0])]
        return float(alpha) * velocity + float(sigma) * x if self.noise else velocity


@pytest.fixture(scope="module")
def toy() -> Timed:
    return Timed()


@pytest.fixture(scope="module")
def of_toys(toy: Timed) -> Iterator[Engine]:
    made = started(toy, 16)
    yield made
    made.stop(0)


@pytest.fixture(scope="module")
def fixed(toy: Timed) -> Iterator[Engine]:
    """An engine whose ticks take as many rows as fit, which are few."""
    made = started(toy, 4, deterministic=True)
    yield made
    made.stop(0)


def test_any_mix_is_what_each_image_is_by_the_authors_loop(of_toys: Engine, toy: Timed) -> None:
    """The same evaluations are skipped; images without a cache beside them are unchanged."""
    fields: dict[str, Any] = {"cache": EASY, "steps": STEPS}
    later: dict[str, Any] = {**fields, "cache": EasyCache(threshold=0.8, start=0.3, stop=0.8)}
    cached = [
        toy_task(**fields),
        toy_task(Unguided(), seed=1, **fields),
        toy_task(
            APG(scale=2), settings=(PAG(scale=1, start=0.5),), sampler=DDIM(), seed=2, **fields
        ),
        toy_task(CFGPlusPlus(), sampler=Heun(), seed=3, **fields),
        toy_task(policy=Interval(low=0, high=1e9, start=0.3, stop=0.7), seed=4, **fields),
        toy_task(policy=Reuse(every=3), seed=5, **fields),
        toy_task(policy=Adaptive(threshold=0.97), seed=6, **fields),
        toy_task(sampler=DDIM(eta=1.0), seed=7, **fields),
        toy_task(seed=8, **later),
    ]
    plain = [toy_task(seed=9 + k, steps=STEPS - k) for k in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        # This call waits for the device, which a tick may do only once, at its end.
        patch.setattr(torch.Tensor, "new_tensor", None)
        ear = run(of_toys, [*cached, *plain])
    assert not ear.errors, ear.errors
    skipped = 0
    for k, one in enumerate(cached):
        peer = AuthorsLoop(toy, one)
        assert np.abs(ear.results[k].pixels - peer.pixels().astype(int)).max() <= 2, k
        assert ear.results[k].evaluations == peer.spent, k
        skipped += peer.saved > 0
    assert skipped == len(cached)
    for k, one in enumerate(plain, len(cached)):
        expected = ByHand(toy, one).pixels().astype(int)
        assert np.abs(ear.results[k].pixels - expected).max() <= 2


def test_a_network_that_predicts_the_noise_skips_what_its_twin_of_the_velocity_skips() -> None:
    one = toy_task(cache=EasyCache(threshold=0.1), steps=STEPS)
    results: list[ImageResult] = []
    for noise in (True, False):
        engine = started(Twin(noise=noise, plan=one.plan), 4)
        results.append(run(engine, [one]).results[0])
        engine.stop(0)
    of_noise, of_velocity = results
    assert of_noise.evaluations == of_velocity.evaluations < 2 * STEPS
    assert np.abs(of_noise.pixels - of_velocity.pixels.astype(int)).max() <= 2


def test_what_is_saved_is_counted_for_the_cache_and_for_the_policy(of_toys: Engine) -> None:
    policy = Interval(low=0, high=1e9, start=0.3, stop=0.7)
    one = toy_task(policy=policy, cache=EASY, steps=STEPS)
    before = of_toys.measurements.saved.copy()
    result = run(of_toys, [one]).results[0]
    gained = of_toys.measurements.saved - before
    assert result.evaluations + result.saved == 2 * STEPS
    assert gained["easy_cache"] > 0
    assert gained == {"easy_cache": gained["easy_cache"], "interval": 0.6 * STEPS}
    assert result.saved == gained.total()


def test_where_the_network_begins_to_be_changed_it_is_evaluated(
    of_toys: Engine, toy: Timed
) -> None:
    """Otherwise the cache would reuse what the network put out before the change."""
    times = SCHEDULE.conditioning(toy_task(steps=STEPS).plan.t[:-1]).astype(np.float32)
    toy.times.clear()
    run(of_toys, [toy_task(cache=EASY, steps=STEPS)])
    first = next(k for k, time in enumerate(times) if time not in toy.times)
    toy.times.clear()
    away = NAG(start=first / STEPS)
    run(of_toys, [toy_task(settings=(away,), cache=EASY, steps=STEPS)])
    assert times[first] in toy.times


def test_a_controlnet_or_an_image_prompt_that_begins_to_act_changes_the_network() -> None:
    steering = ControlUse(Control("", None, 0, 1.0), torch.zeros(3, SIDE, SIDE), start=0.5)
    shown = ImagePromptUse(UNLOADED, (torch.zeros(3, 8, 8),), 0, end=0.25)
    task = toy_task(controls=(steering,), image_prompts=(shown,), steps=4)
    sequence = Sequence(task, 0, Ear(1), Submission(1))
    found: list[tuple[tuple[int, ...], ...]] = []
    for stage in range(4):
        sequence.stage = stage
        found.append(sequence.inside)
    assert found == [
        ((), (), (0,), ()),
        ((), (), (), ()),
        ((), (0,), (), ()),
        ((), (0,), (), ()),
    ]


def test_a_stage_that_is_skipped_takes_no_tick_and_no_row(of_toys: Engine, toy: Timed) -> None:
    toy.seen.clear()
    ticks = of_toys.measurements.ticks
    ear = run(of_toys, [toy_task(cache=EASY, steps=STEPS)])
    forwards = ear.results[0].evaluations // 2
    assert forwards < STEPS
    assert [len(x) for x in toy.seen] == [2] * forwards
    assert of_toys.measurements.ticks - ticks == forwards
    assert [step for _, step in ear.steps] == [*range(1, STEPS + 1)]


def test_nobody_waits_for_all_stages_that_another_image_recalls(
    of_toys: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one tick, a run that recalls nearly all of its stages would take seconds."""
    decide = EasyCache.decide

    def always(*given: Any) -> Decision:
        made = decide(*given)
        return made._replace(recalls=torch.ones_like(made.recalls))

    monkeypatch.setattr(EasyCache, "decide", always)
    real = recall.recall
    arrived: list[Submission] = []
    submissions: list[Submission] = []
    submitted = Event()

    class Second(Ear):
        def finished(self, index: int, result: ImageResult) -> None:
            assert submitted.wait(60)
            submissions[0].cancel()
            super().finished(index, result)

    first, second = Ear(1), Second(1)

    def slowly(batch: Batch) -> Evaluated:
        if not arrived:
            arrived.append(of_toys.submit([toy_task(steps=3)], second, Client("second")))
        sleep(0.03)
        return real(batch)

    monkeypatch.setattr(recall, "recall", slowly)
    lazy = toy_task(cache=EasyCache(start=0), steps=100)
    submissions.append(of_toys.submit([lazy], first, Client("first")))
    submitted.set()
    assert not second.wait().errors
    assert isinstance(first.wait().errors[0], Cancelled)
    assert len(first.steps) < 100


def test_memory_that_recalling_lacks_says_nothing_of_how_many_rows_a_forward_may_have(
    of_toys: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward ran, and a lane's limit on rows recovers only after hundreds of full ticks."""
    real, attempts = recall.recall, list[int]()

    def for_one(batch: Batch) -> Evaluated:
        attempts.append(len(batch.sequences))
        if len(batch.sequences) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(batch)

    monkeypatch.setattr(recall, "recall", for_one)
    tasks = [toy_task(cache=EASY, steps=STEPS, seed=seed) for seed in range(2)]
    assert not run(of_toys, tasks).errors
    assert {1, 2} <= set(attempts)
    caps = {lane.row_cap.rows for lane in of_toys._lanes}
    assert caps == {of_toys.measurements.row_budget}
    assert not of_toys._overflows.knows("toy")


def test_a_cached_image_is_the_same_to_the_bit_alone_and_among_others(fixed: Engine) -> None:
    tasks = [toy_task(cache=EASY, steps=STEPS, seed=k) for k in range(3)]
    others = [
        toy_task(steps=STEPS - 1, seed=4),
        toy_task(Unguided(), steps=STEPS, cache=EASY, seed=5),
    ]
    together = run(fixed, [*tasks, *others]).results
    for k, one in enumerate(tasks):
        alone = run(fixed, [one]).results[0]
        assert np.array_equal(alone.pixels, together[k].pixels)
        assert alone.evaluations == together[k].evaluations < 2 * STEPS


def test_with_a_threshold_of_0_it_is_the_run_without_a_cache_to_the_bit(fixed: Engine) -> None:
    never = EasyCache(threshold=0, start=0)
    cached, plain = (
        run(fixed, [toy_task(cache=one, steps=STEPS)]).results[0] for one in (never, None)
    )
    assert np.array_equal(cached.pixels, plain.pixels)
    assert (cached.evaluations, cached.saved) == (2 * STEPS, 0)


def test_rows_that_are_skipped_are_taken_by_others(fixed: Engine) -> None:
    """Two of four images fit in a tick; a row that one skips makes room for the next."""
    ticks: list[int] = []
    for cache in (None, EASY):
        before = fixed.measurements.ticks
        ear = run(fixed, [toy_task(cache=cache, steps=STEPS, seed=k) for k in range(4)])
        spent = sum(result.evaluations for result in ear.results.values())
        ticks.append(fixed.measurements.ticks - before)
        assert ticks[-1] <= spent // 4 + 2
    assert ticks[1] < ticks[0]


def test_an_image_is_what_diffusers_draws_with_the_authors_forward(
    engine: Engine, thin_folder: Path, task: Callable[..., ImageTask]
) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(thin_folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    cache, steps, prompt = EasyCache(threshold=0.4), 12, "a large red circle at sunset"
    forward = pipeline.unet.forward
    was: dict[str, Any] = {"count": 0, "evaluated": 0, "error": 0.0, "k": None}

    def easycache_forward(sample: Tensor, *told: Any, **also: Any) -> tuple[Tensor, ...]:
        """The loop for both predictions, of which the second is the prompt's."""
        count, x = was["count"], sample[1]
        calculates = count / steps < cache.start or count == steps - 1 or was["k"] is None
        if calculates:
            was["error"] = 0.0
        else:
            moved = (x - was["x"]).abs().mean()
            was["error"] += was["k"] * moved / was["output"].abs().mean()
            calculates = not was["error"] < cache.threshold
        was["count"], was["x"] = count + 1, x
        if not calculates:
            return (sample + was["cache"],)
        (output, *rest) = forward(sample, *told, **also)
        if was["evaluated"]:
            moved = (x - was["evaluated_x"]).abs().mean()
            was["k"] = (output[1] - was["output"]).abs().mean() / moved
        was.update(evaluated_x=x, output=output[1], cache=output - sample, error=0.0)
        was["evaluated"] += 1
        return (output, *rest)

    pipeline.unet.forward = easycache_forward
    start = start_noise(7, (4, 12, 12))
    answer = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=4.0,
        latents=start[None],
        output_type="latent",
    )
    drawn = pipeline.vae.decode(answer.images / pipeline.vae.config.scaling_factor).sample
    ours = run(engine, [task(rule=CFG(scale=4.0), steps=steps, cache=cache, prompt=prompt)])
    assert 2 * was["evaluated"] == ours.results[0].evaluations < 2 * steps
    expected = to_uint8(drawn)[0].numpy().astype(int)
    assert np.abs(ours.results[0].pixels - expected).max() <= 2
