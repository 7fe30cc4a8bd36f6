"""Images that avoid a picture: its row, their rows, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listed
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel
from torch import Tensor

from embedded import MODEL_FOLDER
from guidance import GradientFree, NegToMe, SkipTuning
from guidance.adaptive import Adaptive
from guidance.autoguidance import Autoguidance
from guidance.edits import Edit, WeakModel
from guidance.interval import Interval
from guidance.pag import PAG
from guidance.seg import SEG
from guidance.unguided import Unguided
from samplers import preconditioning
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.heun import Heun
from server.engine.cost_model import TickCost
from server.engine.engine import Engine
from server.engine.state.batch import Batch
from server.engine.state.lane import Lane
from server.engine.state.noise import start_noise
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.task import ImageTask
from server.engine.tick import weave
from server.engine.tick.newcomers import Admission
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.unet_model import TEXT
from tests.covering import EVERY_CELL
from tests.server.by_hand import TOGETHER, Asked, ByHand, task, terms_for
from tests.server.token_merging import kept_apart
from tests.server.toy_model import SIDE, Neighbourly, Toy, run, started

SHAPE = (4, SIDE // 8, SIDE // 8)


def picture(seed: int, side: int = SIDE) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def avoiding(seed: int = 1, beside: tuple[Any, ...] = (), **fields: Any) -> dict[str, Any]:
    """Fields of a task that avoids a picture."""
    negtome = NegToMe.model_validate({"stop": 0.5, **fields})
    return {"settings": (*beside, negtome), "reference": picture(seed)}


class AwayByHand(ByHand):
    """Each prediction in a batch of two, of which the first is the picture."""

    def denoised(self, i: int, x: Tensor, text: str | None, *edits: Edit) -> Tensor:
        task, changes = self.task, (*self.edits, *edits)
        negtome = next((one for one in task.settings if isinstance(one, NegToMe)), None)
        if negtome is None or self.progress[i] >= negtome.stop or WeakModel() in changes:
            return super().denoised(i, x, text, *edits)
        assert task.reference is not None
        [latents] = self.model.encode_image(task.reference[None])
        level = float(self.plan.alpha[i]), float(self.plan.sigma[i])
        shown = level[0] * latents + level[1] * start_noise(task.seed, SHAPE)
        points = torch.stack([shown, x[0]])
        scale = getattr(task.rule, "scale", 1.0) - 1
        raw = self.model.evaluate(
            float(self.scales.scale_in[i]) * points,
            torch.full((2,), float(self.times[i])),
            replace(
                self.model.inputs([task.prompt_text, text]),
                edits=[(*self.edits,), (*changes, replace(negtome.edit, reference=0))],
                scale_embedding=torch.full((2,), scale) if task.policy.embeds else None,
            ),
        )
        return (float(self.scales.skip[i]) * points + float(self.scales.out[i]) * raw)[1:]


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


def assert_alike(ours: Any, theirs: Any) -> None:
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


@pytest.mark.parametrize("turn", range(2) if EVERY_CELL else [0])
def test_any_guidance_beside_a_picture_is_what_each_image_is_by_hand(
    engine: Engine, model: Neighbourly, turn: int
) -> None:
    solvers = [DPMSolverPP(), Heun()]
    terms: list[tuple[BaseModel, ...]] = [
        (),
        (PAG(),),
        (SEG(scale=1, start=0.3), Autoguidance(scale=0.2)),
    ]
    beside = [(*terms[k % 3], *([SkipTuning(bottom=0.5)] * (k % 2))) for k in range(len(TOGETHER))]
    tasks = [
        task(
            rule,
            policy,
            sampler=solvers[(k // 4 + turn) % 2],
            steps=5,
            seed=k,
            **dict[str, Any](avoiding(k, beside[k]) if k % 4 else {"settings": beside[k]}),
            image=picture(99) if k % 5 == 0 and not policy.wants_reference else None,
        )
        for k, (rule, policy) in enumerate(TOGETHER)
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    for k, one in enumerate(tasks):
        assert_alike(ear.results[k].pixels, AwayByHand(model, one).pixels())
    plain = task(*TOGETHER[1], beside[1], sampler=solvers[turn], steps=5, seed=1)
    [alone] = run(engine, [plain]).results.values()
    assert np.abs(alone.pixels.astype(int) - ear.results[1].pixels).max() > 5


START = picture(7)
MASK = (torch.arange(SIDE) < SIDE // 2).float().expand(SIDE, SIDE)


@pytest.mark.parametrize(
    "fields", [{}, {"image": START}, {"image": START, "mask": MASK}], ids=["none", "image", "mask"]
)
@pytest.mark.parametrize("sampler", [DDIM(), Heun()], ids=lambda one: one.name)
def test_the_picture_goes_in_at_the_level_of_each_stage_in_the_window(
    engine: Engine, model: Toy, sampler: Any, fields: dict[str, Any]
) -> None:
    avoided = avoiding(stop=0.5)
    one = task(sampler=sampler, **avoided, seed=11, **fields)
    model.seen.clear()
    ear = run(engine, [one])
    assert not ear.errors
    [latents] = model.encode_image(avoided["reference"][None])
    plan, shown = one.plan, []
    for i, x in enumerate(model.seen):
        level = plan.alpha[i] * latents + plan.sigma[i] * start_noise(11, SHAPE)
        shown.append([torch.allclose(row, level, atol=1e-6) for row in x])
    inside = [step / plan.steps < 0.5 for step in plan.step]
    assert 0 < sum(inside) < len(inside)
    assert [rows[2:] for rows in shown] == [[True] if open_ else [] for open_ in inside]
    if not fields:
        # At pure noise the image's own rows are nearly the same.
        assert [any(rows[:2]) for rows in shown[1:]] == [False] * (len(inside) - 1)


COSTS = {
    "cfg": (task(**avoiding()), 12 + 3),
    "none": (task(Unguided(), **avoiding()), 6 + 3),
    "always open": (task(**avoiding(stop=1.0)), 12 + 6),
    "by noise": (task(**avoiding(stop=1.0, low=1e8)), 12),
    "two stages a step": (task(sampler=Heun(), steps=4, **avoiding()), 14 + 4),
    "interval": (task(policy=Interval(low=0, high=1e9, start=0.5), **avoiding()), 9 + 3),
    "settled": (task(policy=Adaptive(threshold=-1.0), **avoiding(stop=1.0)), 7 + 6),
    "perturbed": (task(**avoiding(beside=(PAG(),))), 18 + 3),
    "weak": (task(**avoiding(beside=(Autoguidance(),))), 18 + 3),
}


@pytest.mark.parametrize("kind", COSTS)
def test_it_costs_an_evaluation_at_each_stage_in_the_window(engine: Engine, kind: str) -> None:
    one, spent = COSTS[kind]
    before = engine.measurements.evaluations
    result = run(engine, [one]).results[0]
    assert result.evaluations == spent
    assert engine.measurements.evaluations - before == spent


def test_images_that_avoid_a_picture_run_each_by_itself(engine: Engine) -> None:
    avoided = avoiding()
    tasks = [task(**avoided, seed=seed) for seed in range(9)]
    together = run(engine, tasks)
    for seed in (0, 8):
        [alone] = run(engine, [tasks[seed]]).results.values()
        assert_alike(alone.pixels, together.results[seed].pixels)


def test_an_image_is_bit_identical_alone_and_in_any_mix(fixed_engine: Engine) -> None:
    one = task(**avoiding(beside=(PAG(),)), seed=5)
    [alone] = run(fixed_engine, [one]).results.values()
    company = [
        task(**avoiding(4, strength=3.0, stop=1.0), sampler=Heun(), seed=1),
        task(settings=(Autoguidance(),)),
        one,
        task(Unguided(), **avoiding(6, stop=1.0)),
    ]
    ear = run(fixed_engine, company)
    assert not ear.errors
    assert np.array_equal(ear.results[2].pixels, alone.pixels)


def test_a_picture_that_is_not_finite_moves_nobody(engine: Engine) -> None:
    broken = torch.full((3, SIDE, SIDE), torch.nan)
    one = task(settings=(NegToMe(stop=1.0),), reference=broken, seed=3)
    ear = run(engine, [one, task(seed=3)])
    assert not ear.errors
    assert_alike(ear.results[0].pixels, ear.results[1].pixels)


def packed(model: HostedModel, tasks: Listed[ImageTask], fixed_rows: int | None) -> Batch:
    """The batch of a first tick, as the engine makes it."""
    shape = model.latent_shape(128, 128)
    lane = Lane(model, shape, TickCost({1: 1.0}), 8, fixed_rows=fixed_rows)
    sequences = [
        Sequence(one, k, None, Submission(1))  # type: ignore[arg-type]
        for k, one in enumerate(tasks)
    ]
    admission = Admission(
        {one.model: model for one in tasks},
        lambda *_: lane,
        lambda one, _: one.encode_image,
        deterministic=False,
    )
    assert not [*admission.admit(sequences)]
    return weave.pack(lane, sequences)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(
        MODEL_FOLDER / "unet", use_safetensors=True, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def embedded() -> HostedModel:
    return load_model(MODEL_FOLDER, name="toy", device="cpu", dtype="float32")


def part_way(
    model: HostedModel, seed: int, *settings: Any, reference: Tensor | None = None, **fields: Any
) -> Asked:
    """An image whose first stage has some noise and some of a picture."""
    plan = DDIM().plan(model.default_schedule.grid("trailing", 10).tail(0.1 * (4 + seed)))
    told = {"prompt": "a blue ring", "reference": reference}
    own = {"plan": plan, "width": 128, "height": 128, "image": picture(seed, 128)}
    terms = terms_for(settings, plan, model, **told)
    return replace(task(seed=seed, **told, **fields), **own, settings=settings, terms=terms)


@torch.inference_mode()
@pytest.mark.parametrize("fixed_rows", [None, 16])
def test_rows_equal_a_batch_of_their_own_under_an_ordinary_hook(
    embedded: HostedModel, unet: UNet2DConditionModel, fixed_rows: int | None
) -> None:
    """A batch of the picture, then the row, in the network with all attentions changed."""
    layers = tuple(name for name in embedded.layers() if name.startswith("up_blocks"))
    assert embedded.classifier is not None
    shapes = embedded.classifier.heads["shape"]
    doubt = GradientFree(target={"shape": "ring"})
    weakly = NegToMe(stop=1.0, strength=0.9, threshold=0.98)
    strongly = NegToMe(stop=1.0, strength=2.0, threshold=0.98)
    tasks = [
        part_way(embedded, 1, PAG()),
        part_way(embedded, 2, weakly, reference=picture(40, 128)),
        part_way(embedded, 3, strongly, doubt, reference=picture(41, 128)),
        part_way(embedded, 4, rule=Unguided()),
    ]
    batch = packed(embedded, tasks, fixed_rows)
    ours = weave.evaluate([batch])[0].denoised
    assert batch.owners == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 2]
    levels = (torch.tensor([getattr(batch.plans[2], name)[0]]) for name in ("alpha", "sigma"))
    [logits] = embedded.classify(batch.columns[2:3, 0], *levels)["shape"]
    logits[shapes.index("ring")] = -torch.inf
    likeliest = "a blue ring".replace("ring", shapes[int(logits.argmax())])
    [chosen] = embedded.inputs([likeliest]).conditioning.tensors[TEXT]
    both = embedded.inputs([tasks[1].prompt_text, tasks[1].negative_prompt])
    prompt, negative = both.conditioning.tensors[TEXT]
    texts = {1: prompt, 2: prompt, 6: negative, 8: negative, 10: chosen}
    moved: list[float] = []
    for row, text in texts.items():
        one, x = tasks[batch.owners[row]], batch.columns[batch.owners[row], 0]
        plan, negtome = one.plan, one.settings[0]
        assert one.reference is not None
        assert isinstance(negtome, NegToMe)
        noised = float(plan.alpha[0]) * embedded.encode_image(one.reference[None])[0]
        noised += float(plan.sigma[0]) * start_noise(one.seed, x.shape)
        points, told = torch.stack([noised, x]), torch.stack([prompt, text])
        t = torch.tensor(embedded.network_time(plan.t[:1]), dtype=torch.float32)
        network, merging = kept_apart(unet, layers, negtome.strength, negtome.threshold)
        scales = preconditioning(embedded.facts.prediction, plan.alpha[0], plan.sigma[0])
        inputs = float(scales.scale_in) * points, t.expand(2)
        raw = network(*inputs, encoder_hidden_states=told).sample
        denoised = float(scales.skip) * points + float(scales.out) * raw
        torch.testing.assert_close(ours[row], denoised[1], rtol=1e-4, atol=1e-5)
        place = {1: 7, 2: 9}[batch.owners[row]]
        torch.testing.assert_close(ours[place], denoised[0], rtol=1e-4, atol=1e-5)
        moved += merging.moved
    assert 0 < sum(0 < share < 1 for share in moved) < len(moved)
    [plain] = weave.evaluate([packed(embedded, [replace(one, terms=()) for one in tasks], None)])
    for row in (0, 3):
        torch.testing.assert_close(ours[row], plain.denoised[row], rtol=1e-4, atol=1e-5)
    assert min(float((ours[row] - plain.denoised[row]).abs().max()) for row in (1, 2)) > 1e-3
