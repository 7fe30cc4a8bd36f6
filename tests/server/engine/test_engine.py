"""What the engine guarantees, checked on the real model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from threading import Event
from time import sleep
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidance import POLICIES, RULES, Guided, Rows, Rule, guide
from guidance.adaptive import Adaptive
from guidance.autoguidance import Autoguidance
from guidance.cfg import CFG
from guidance.interval import Interval
from guidance.pag import PAG
from guidance.seg import SEG
from guidance.skip_tuning import SkipTuning
from guidance.slg import SLG
from samplers import SAMPLERS, integrate, preconditioning
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.timesteps import Trailing
from server.engine.engine import FIXED_ROWS_MULTIPLE, Engine
from server.engine.state.lanes import MAX_IDLE_LANES
from server.engine.state.noise import stage_noise, start_noise
from server.engine.task import ImageTask
from server.engine.tick.decode import DECODER_BATCH
from server.engine.tick.preview import to_uint8
from server.errors import Cancelled, NotReady, Overloaded, RowFailed
from tests.covering import EVERY_CELL
from tests.server import toy_model
from tests.server.by_hand import task as toy_task
from tests.server.engine.conftest import PATIENCE_S, SIDE
from tests.server.engine.conftest import by_name as sampler_of
from tests.server.toy_model import Toy

NAMES = [sampler.model_fields["name"].default for sampler in SAMPLERS]
RULE_NAMES = [rule.model_fields["name"].default for rule in RULES]
POLICY_NAMES = [policy.model_fields["name"].default for policy in POLICIES]


def by_name(registry: tuple[type[Any], ...], name: str) -> type[Any]:
    return {entry.model_fields["name"].default: entry for entry in registry}[name]


CLOSE = 2
"""Steps of 255 that rounding in another batch shape may move a pixel."""


def apart(a: Any, b: Any) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def by_hand(model, task) -> Any:
    """The same image by the library's loops: one request, no engine."""
    facts, plan = model.facts, task.plan
    prompts = model.inputs([task.prompt, task.negative_prompt])

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        stage = by_t.pop(0)
        scales = preconditioning(facts.prediction, task.plan.alpha[:-1], task.plan.sigma[:-1])
        both = x.expand(2, -1, -1, -1)
        told = torch.full((2,), float(model.network_time(np.array(t))))
        raw = model.evaluate(float(scales.scale_in[stage]) * both, told, prompts)
        cond, uncond = float(scales.skip[stage]) * both + float(scales.out[stage]) * raw
        guided = guide(
            task.rule,
            cond[None],
            [uncond[None]],
            x,
            float(plan.alpha[stage]),
            float(plan.sigma[stage]),
            opens_step=plan.opens_step(stage),
        )
        x.copy_(guided.x)
        return guided.denoised

    by_t = list(range(task.plan.evaluations))
    shape = model.latent_shape(task.width, task.height)
    x = task.plan.start_scale * start_noise(task.seed, shape)[None]
    with torch.inference_mode():
        clean = integrate(
            task.plan, denoise, x, lambda stage: stage_noise(task.seed, stage, shape)[None]
        )
        return to_uint8(model.decode(clean))[0].numpy()


# A step of one stage, of two, and one that draws noise.
@pytest.mark.parametrize("sampler", NAMES if EVERY_CELL else ["ddim", "heun", "euler_ancestral"])
def test_an_image_is_what_the_library_loop_gives(engine, model, task, run, sampler):
    one = task(sampler, steps=4)
    [pixels] = run(engine, [one]).pixels()
    assert apart(pixels, by_hand(model, one)) <= CLOSE


@pytest.fixture(scope="module")
def toy() -> Iterator[tuple[Toy, Engine]]:
    model = Toy()
    engine = toy_model.started(model, 16)
    yield model, engine
    engine.stop(0)


@pytest.mark.parametrize("sampler", NAMES)
def test_each_sampler_draws_in_the_engine_what_it_draws_in_the_library_loop(toy, sampler):
    model, engine = toy
    one = toy_task(sampler=sampler_of(sampler), steps=5)
    pixels = toy_model.run(engine, [one]).results[0].pixels
    expected = by_hand(model, one)
    assert apart(pixels, expected) <= CLOSE
    assert expected.std() > 10, "a plain picture would tell nothing"


def test_cfg_plus_plus_moves_x_once_a_step_in_the_engine_too(engine, model, task, run):
    one = task("heun", "cfg_plus_plus", steps=4)
    [pixels] = run(engine, [one]).pixels()
    assert apart(pixels, by_hand(model, one)) <= CLOSE


def test_an_image_is_what_diffusers_own_pipeline_gives(engine, thin_folder, task, run):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(thin_folder)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a large blue square on a black background"
    answer: Any = pipeline(
        prompt,
        negative_prompt="green",
        num_inference_steps=5,
        guidance_scale=4.0,
        width=SIDE,
        height=SIDE,
        generator=torch.Generator("cpu").manual_seed(11),
        output_type="np",
    )
    theirs = answer.images[0]
    one = task("ddim", CFG(scale=4.0), steps=5, prompt=prompt, negative_prompt="green", seed=11)
    [ours] = run(engine, [one]).pixels()
    assert apart(ours, (theirs * 255).round()) <= CLOSE


TUNED = SkipTuning(bottom=0.7)
BESIDE = [
    (),
    (TUNED,),
    (PAG(),),
    (TUNED, SEG(scale=2), SLG(start=0, stop=0.5)),
    (Autoguidance(),),
    (TUNED, Autoguidance()),
]


def goes_together(fields: dict[str, Any]) -> bool:
    """Whether the policy can serve the rule."""
    policy, rule = by_name(POLICIES, fields["policy"]), by_name(RULES, fields["rule"])
    return policy().refuses(rule()) is None


mixes = st.lists(
    st.fixed_dictionaries(
        {
            "settings": st.sampled_from(BESIDE),
            "sampler": st.sampled_from(NAMES),
            "rule": st.sampled_from(RULE_NAMES),
            "policy": st.sampled_from(POLICY_NAMES),
            "steps": st.integers(1, 4),
            "seed": st.integers(0, 2**63 - 1),
            "prompt": st.sampled_from(["a red circle", "a green star on the left", ""]),
            "negative_prompt": st.sampled_from(["", "blue"]),
        }
    ).filter(goes_together),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def needle(fixed_engine, task, run) -> tuple[ImageTask, Any]:
    """A task, and its image when it runs alone."""
    one = task("unipc", "apg", "adaptive", steps=4, seed=99)
    return one, run(fixed_engine, [one]).pixels()[0]


@settings(max_examples=40 if EVERY_CELL else 2)
@given(mixes)
def test_deterministic_images_are_bit_identical_alone_and_in_any_mix(
    fixed_engine, task, run, needle, mix
):
    needle, alone = needle
    others = [task(**fields) for fields in mix]
    together = run(fixed_engine, [*others, needle]).pixels()[-1]
    assert np.array_equal(alone, together)


def test_at_the_fixed_shapes_a_row_does_not_feel_its_place_or_company(model):
    shape = model.latent_shape(SIDE, SIDE)
    prompts = model.inputs(["a red circle", None])

    def placed(row: torch.Tensor, rows: int, place: int) -> torch.Tensor:
        company = torch.randn(rows, *shape)
        company[place] = row
        return company

    row = torch.randn(shape)
    with torch.inference_mode():
        evaluated, decoded = set(), set()
        for place in range(FIXED_ROWS_MULTIPLE):
            x = placed(row, FIXED_ROWS_MULTIPLE, place)
            t = torch.randint(1, 999, (len(x),)).float()
            t[place] = 500
            told = torch.randint(0, 2, (len(x),))
            told[place] = 0
            inputs = prompts.of(told.tolist())
            evaluated.add(model.evaluate(x, t, inputs)[place].numpy().tobytes())
        for place in range(DECODER_BATCH):
            pictures = model.decode(placed(row, DECODER_BATCH, place))
            decoded.add(pictures[place].numpy().tobytes())
    assert len(evaluated) == 1
    assert len(decoded) == 1


@settings(max_examples=40 if EVERY_CELL else 2)
@given(mixes)
def test_otherwise_a_mix_moves_an_image_by_rounding_alone(engine, task, run, mix):
    tasks = [task(**fields) for fields in mix]
    together = run(engine, tasks).pixels()
    for one, pixels in zip(tasks, together, strict=True):
        assert apart(run(engine, [one]).pixels()[0], pixels) <= CLOSE


def test_a_newcomer_joins_an_image_under_way(start, task, listen):
    engine = start()
    short = listen(1)
    long = listen(1)
    overtaken: list[bool] = []

    def join(step: int) -> None:
        if step == 3:
            engine.submit([task(steps=2, seed=2)], short)

    long.on_progress = join
    short.on_end = lambda: overtaken.append(not long.ended.is_set())
    engine.submit([task(steps=20)], long)
    short.wait()
    long.wait()
    assert overtaken == [True], "the short one was to overtake"
    assert engine.measurements.rows_per_tick[4] > 0, "both were to share a forward"
    assert not long.errors
    assert not short.errors


def test_evaluations_spent_and_saved_add_up_and_the_policy_is_credited(start, task, run):
    engine = start()
    at_once = Adaptive(threshold=-1.0)
    never = Adaptive(threshold=1.0)
    half = Interval(low=0, high=1e9, start=0.5)
    heard = run(engine, [task(policy=p, steps=6) for p in (at_once, never, half)])
    spent = [heard.results[i].evaluations for i in range(3)]
    saved = [heard.results[i].saved for i in range(3)]
    assert spent == [7, 12, 9]
    assert saved == [5, 0, 3]
    assert engine.measurements.saved == {"adaptive": 5, "interval": 3}
    assert engine.measurements.evaluations == sum(spent)


def test_rows_that_adaptive_guidance_frees_are_filled_in_the_same_tick(start, task, run):
    engine = start(row_budget=4)
    freed = task(policy=Adaptive(threshold=-1.0), steps=9)
    run(engine, [freed, freed, task(rule="none", steps=20), task(rule="none", steps=20)])
    # At first two guided pairs; later each runs alone and unguided images use the room.
    assert engine.measurements.rows_per_tick[4] >= 9


def test_a_scale_of_one_costs_one_evaluation_a_step_and_saves_nothing_by_policy(engine, task, run):
    result = run(engine, [task(rule=CFG(scale=1.0), steps=5)]).results[0]
    assert (result.evaluations, result.saved) == (5, 0)


def test_cancelling_frees_the_rows_and_leaves_the_others_alone(start, task, listen):
    engine = start()
    doomed = listen(2)
    spared = listen(1)
    submitted, submissions = Event(), []

    def cancel():
        assert submitted.wait(PATIENCE_S)
        submissions[0].cancel()

    doomed.on_start = cancel
    submissions.append(engine.submit([task(steps=200, seed=s) for s in (1, 2)], doomed))
    engine.submit([task(steps=3)], spared)
    submitted.set()
    doomed.wait()
    spared.wait()
    assert [type(e) for e in doomed.errors.values()] == [Cancelled, Cancelled]
    assert not spared.errors
    assert engine.measurements.pending == 0
    assert engine.measurements.cancelled == 2
    assert engine.measurements.ticks < 100


def test_a_nan_row_ends_its_own_request_alone(fixed_engine, task, run):
    poisoned = task(image=torch.full((3, SIDE, SIDE), torch.nan), strength=1.0)
    sound = [task(s, seed=k) for k, s in enumerate(("unipc", "ddim", "euler_ancestral"))]
    clean = run(fixed_engine, sound).pixels()
    for position in (0, 2):
        heard = run(fixed_engine, [*sound[:position], poisoned, *sound[position:]])
        assert list(heard.errors) == [position]
        assert isinstance(heard.errors[position], RowFailed)
        assert "NaN" in str(heard.errors[position])
        left = [heard.results[i].pixels for i in sorted(heard.results)]
        assert all(np.array_equal(a, b) for a, b in zip(left, clean, strict=True))


class Explosive(Rule, frozen=True):
    summary: ClassVar[str] = "Raises."
    source: ClassVar[str] = "None."
    name: Literal["explosive"] = "explosive"

    @classmethod
    def combine(cls, rows: Rows, parameters: Mapping[str, torch.Tensor]) -> Guided:
        raise ValueError("boom")


def test_an_exception_in_one_rule_ends_its_own_images_alone(engine, task, run):
    heard = run(engine, [task(), task(rule=Explosive()), task("unipc")])
    assert list(heard.errors) == [1]
    assert "'explosive' failed with ValueError" in str(heard.errors[1])
    assert sorted(heard.results) == [0, 2]


class Cramped:
    """The real model where a forward of more than three rows does not fit in memory."""

    def __init__(self, model):
        self._model = model
        self.armed = False

    def __getattr__(self, name):
        return getattr(self._model, name)

    def evaluate(self, x, t, inputs):
        if self.armed and len(x) > 3:
            raise torch.OutOfMemoryError("no room")
        return self._model.evaluate(x, t, inputs)

    def decode(self, latents):
        if self.armed and len(latents) > 1:
            raise torch.OutOfMemoryError("no room")
        return self._model.decode(latents)


def test_running_out_of_memory_splits_the_batch_and_loses_nothing(start, model, task, run):
    cramped = Cramped(model)
    engine = start(model=cramped)
    tasks = [task(s, seed=k) for k, s in enumerate(("unipc", "heun", "ddim", "lcm"))]
    expected = run(engine, tasks).pixels()
    cramped.armed = True
    survived = run(engine, tasks).pixels()
    assert max(apart(a, b) for a, b in zip(expected, survived, strict=True)) <= CLOSE


def test_a_full_queue_refuses_with_the_time_to_wait(start, task, listen):
    engine = start(max_pending=3)
    first, refused = listen(3), Event()
    first.on_start = lambda: refused.wait(PATIENCE_S)
    submission = engine.submit([task(steps=50, seed=s) for s in range(3)], first)
    with pytest.raises(Overloaded) as refusal:
        engine.submit([task()], listen(1))
    assert refusal.value.retry_after_s >= 1
    assert engine.measurements.refused == 1
    submission.cancel()
    refused.set()
    first.wait()
    assert engine.submit([task(steps=1)], listen(1))


def test_stopping_drains_what_is_under_way_and_refuses_the_rest(start, task, listen):
    engine = start()
    heard = listen(1)
    engine.submit([task(steps=3)], heard)
    engine.stop(30)
    assert list(heard.results) == [0]
    assert not engine.ready
    with pytest.raises(NotReady):
        engine.submit([task()], listen(1))


def test_stopping_at_once_tells_everybody(start, task, listen):
    engine = start()
    heard = listen(3)

    def wait_for_the_stop():
        with suppress(NotReady):
            while True:
                engine.reserve(1).release()
                sleep(0.01)

    heard.on_start = wait_for_the_stop
    engine.submit([task(steps=200, seed=s) for s in range(3)], heard)
    engine.stop(0)
    heard.wait()
    assert [type(e) for e in heard.errors.values()] == [NotReady] * 3


class Unloadable:
    """The real model with an autoencoder that fails."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_image(self, pixels):
        raise RuntimeError("broken autoencoder")


def test_an_engine_that_cannot_warm_up_says_why_and_takes_nothing(model, task, listen):
    engine = Engine({"embedded": Unloadable(model)})  # type: ignore[dict-item]
    engine.start()
    engine._thread.join(60)
    assert not engine.ready
    assert "broken autoencoder" in str(engine.failure)
    with pytest.raises(NotReady):
        engine.submit([task()], listen(1))


def test_progress_counts_steps_not_evaluations_and_carries_previews(engine, task, run):
    heard = run(engine, [task("heun", steps=4, previews=True)])
    assert heard.steps == [(0, k, 4) for k in (1, 2, 3, 4)]
    assert [p.shape for p in heard.previews] == [(SIDE // 2, SIDE // 2, 3)] * 3


def test_images_of_other_sizes_run_in_a_lane_of_their_own(engine, task, run):
    heard = run(engine, [task(), task(width=64, height=32), task(width=32, height=64)])
    assert [p.shape for p in heard.pixels()] == [(SIDE, SIDE, 3), (32, 64, 3), (64, 32, 3)]


def test_ever_new_sizes_do_not_pile_up_lanes(start, task, run):
    engine = start()
    sizes = [(w, h) for w in range(32, 160, 32) for h in range(32, 128, 32)]
    for width, height in sizes:
        run(engine, [task(width=width, height=height, steps=1)])
    assert len(sizes) > MAX_IDLE_LANES
    assert len(engine._lanes) == MAX_IDLE_LANES


def picture() -> torch.Tensor:
    """White with a red disc."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    image = torch.ones(3, SIDE, SIDE)
    image[1:, (x - 48) ** 2 + (y - 48) ** 2 < 500] = -1
    return image


def test_image_to_image_stays_nearer_to_the_picture_at_lower_strength(engine, model, task, run):
    tasks = [task(image=picture(), steps=20, strength=strength, seed=3) for strength in (0.05, 0.9)]
    near, far = run(engine, tasks).pixels()
    with torch.inference_mode():
        # As the autoencoder reproduces it, since its quality is not what is tested.
        seen = to_uint8(model.decode(model.encode_image(picture()[None])))[0].numpy()
    distance = [np.abs(p.astype(float) - seen).mean() for p in (near, far)]
    assert distance[0] < distance[1]


def test_inpainting_keeps_to_the_pixel_what_it_was_to_keep(engine, task, run):
    mask = torch.zeros(SIDE, SIDE)
    mask[24:72, 24:72] = 1
    tasks = [
        task(s, image=picture(), mask=mask, steps=4, strength=1.0, seed=k)
        for k, s in enumerate(("ddim", "unipc", "heun", "euler_ancestral"))
    ]
    original = to_uint8(picture()[None])[0].numpy()
    kept = mask.numpy() == 0
    for pixels in run(engine, tasks).pixels():
        assert np.array_equal(pixels[kept], original[kept])
        assert not np.array_equal(pixels[~kept], original[~kept])


def test_an_elementwise_table_shares_a_tick_with_scalar_ones(fixed_engine, model, task, run):
    """The same coefficients written out per element give the same picture."""
    scalar = task(DPMSolverPP(order=3), steps=4)
    spread = np.broadcast_to(
        scalar.plan.tables[..., None, None, None],
        (*scalar.plan.tables.shape, *model.latent_shape(SIDE, SIDE)),
    )
    elementwise = replace(scalar, plan=replace(scalar.plan, tables=spread.copy()))
    first, second, _ = run(fixed_engine, [scalar, elementwise, task("unipc")]).pixels()
    assert apart(first, second) <= 1


@pytest.mark.parametrize("size", [128, 64], ids=["elementwise", "per channel"])
def test_statistics_of_the_model_share_a_tick_with_everything_else(
    fixed_engine, model, task, run, size
):
    """Rows of DPM-Solver-v3 equal those of a run alone and of the library's loop."""
    shape = model.latent_shape(size, size)
    statistics = model.statistics.load(model.statistics.exact("cfg", 4.0), shape)
    grid = model.default_schedule.grid(Trailing(), 3)
    plan = DPMSolverV3().plan(grid, statistics)
    assert plan.tables.shape[3:] == (shape if size == 128 else (4, 1, 1))
    one = replace(task(steps=3, width=size, height=size, seed=11), plan=plan)
    others = [task(name, steps=3, width=size, height=size) for name in ("unipc", "heun")]
    [alone] = run(fixed_engine, [one]).pixels()
    first, _, _, second = run(fixed_engine, [one, *others, one]).pixels()
    assert np.array_equal(first, alone)
    assert np.array_equal(second, alone)
    assert apart(alone, by_hand(model, one)) <= CLOSE


def test_rows_of_elementwise_and_per_channel_tables_share_a_tick(fixed_engine, model, task, run):
    """All of one size, as when statistics of a model without guidance are given per channel."""
    grid = model.default_schedule.grid(Trailing(), 2)
    statistics = model.statistics.load(model.statistics.exact("cfg", 4.0), (4, 16, 16))
    tasks = [
        replace(task(steps=2, width=128, height=128), plan=DPMSolverV3().plan(grid, given))
        for given in (statistics, statistics.per_channel())
    ]
    together = run(fixed_engine, tasks).pixels()
    for one, pixels in zip(tasks, together, strict=True):
        assert np.array_equal(run(fixed_engine, [one]).pixels()[0], pixels)
    assert apart(*together) > 0


def test_a_budget_too_small_for_guidance_is_refused(model):
    with pytest.raises(ValueError, match="row_budget is 1; at least 2"):
        Engine({"embedded": model}, row_budget=1)
