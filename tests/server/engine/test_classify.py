"""Guidance by the model's classifier in the engine: gradients, references, other images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embedded.checker import read_picture
from guidance import CFG, EluCD, GradientFree, Minority, Unguided
from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.pag import PAG
from server.engine.cost_model import TickCost
from server.engine.engine import FIXED_ROWS_MULTIPLE
from server.engine.state.batch import Batch
from server.engine.state.lane import Lane
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.terms.classifier import ClassifierGradientTerm, ReferenceGuidanceTerm
from server.engine.tick import weave
from server.errors import RowFailed
from tests.server.by_hand import terms_for
from tests.server.engine.conftest import SIDE

HEADS = {"shape": ("circle", "square", "star"), "minority": ("tenth 9", "tenth 10")}
TOLD = ("a small red square", "a small red star")
CLOSE = 2
"""Steps of 255 that rounding in another batch shape may move a pixel."""


class Linear(nn.Module):
    """Logits that are linear in the latent, and, where it is noisy, in its noise level."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = int(np.prod(shape))
        self.heads = HEADS
        self.rows: list[tuple[int, list[float], list[float]]] = []
        self.weights = {
            name: torch.randn(len(classes), size, generator=generator) / size**0.5
            for name, classes in HEADS.items()
        }

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        self.rows.append((len(x), alpha.tolist(), sigma.tolist()))
        scaled = x.flatten(1) * (1 + sigma)[:, None]
        return {name: scaled @ weight.T for name, weight in self.weights.items()}


@pytest.fixture
def linear(model: Any) -> Iterator[Linear]:
    """Stands in for the model's own classifier."""
    kept = model.classifier
    model.classifier = Linear(model.latent_shape(SIDE, SIDE))
    yield model.classifier
    model.classifier = kept


def elucd(*strengths: float, number: int = 2, **fields: Any) -> ClassifierGradientTerm:
    return ClassifierGradientTerm(EluCD(**fields), (number, -1), strengths)


def minority(*strengths: float) -> ClassifierGradientTerm:
    return ClassifierGradientTerm(Minority(), (-1, 1), strengths)


def reference(*strengths: float) -> ReferenceGuidanceTerm:
    return ReferenceGuidanceTerm(GradientFree(), (0, -1), strengths, TOLD)


@pytest.fixture
def packed(model: Any, task: Any) -> Callable[..., Batch]:
    """The batch of a first tick, as the engine makes it."""

    def pack(tasks: list[Any], fixed_rows: int | None = None) -> Batch:
        shape = model.latent_shape(SIDE, SIDE)
        lane = Lane(model, shape, TickCost({1: 1.0}), 8, fixed_rows=fixed_rows)
        sequences: list[Sequence] = []
        generator = torch.Generator().manual_seed(5)
        for index, one in enumerate(tasks):
            sequence = Sequence(one, index, None, Submission(1))  # type: ignore[arg-type]
            sequence.lane = lane
            texts = sequence.guidance.texts
            encoded = model.encode_prompts(texts, SIDE, SIDE)
            sequence.conditioning = dict(zip(texts, encoded, strict=True))
            sequence.term_states = [None] * len(one.terms)
            sequence.slot = lane.pool.take(one.plan.slots)
            start = torch.randn(lane.shape, generator=generator)
            lane.pool.columns[sequence.slot, 0] = start
            sequences.append(sequence)
        return weave.pack(lane, sequences)

    return pack


def guided(batch: Batch) -> Tensor:
    return weave.guide(batch, weave.evaluate([batch])[0].denoised).denoised


@torch.inference_mode()
def test_the_prediction_moves_by_the_gradient_in_closed_form(linear, packed, task):
    aims = [
        elucd(2.0, 0, 0),
        elucd(0.5, 0, 0, number=1, marginal_temperature=0.8),
        minority(3, 0, 0),
    ]
    plain = packed([task() for _ in aims])
    before, x = guided(plain), plain.columns[:, 0]
    after = guided(packed([task(terms=(aim,)) for aim in aims]))
    sigma = plain.plans[0].sigma[0]
    for row, (aim, T2) in enumerate(zip(aims, (0.5, 0.8, 1.0), strict=True)):
        name, number = ("minority", 1) if row == 2 else ("shape", aim.targets[0])
        shown, factor = (x[row], 1 + sigma) if row == 2 else (before[row], 1.0)
        W = linear.weights[name] * factor
        gradient = W[number] - T2 * torch.softmax(T2 * (W @ shown.flatten()), 0) @ W
        expected = before[row] + aim.strengths[0] * gradient.view_as(x[row])
        torch.testing.assert_close(after[row], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_denoised_pictures_are_shown_as_clean_and_noisy_ones_at_their_level(linear, packed, task):
    linear.rows.clear()
    batch = packed([task(terms=(minority(1, 0, 0),)), task(), task(terms=(elucd(1, 0, 0),))])
    guided(batch)
    plan = batch.plans[0]
    [(rows, alpha, sigma)] = linear.rows
    assert rows == 2
    assert alpha == pytest.approx([plan.alpha[0], 1.0])
    assert sigma == pytest.approx([plan.sigma[0], 0.0])


@torch.inference_mode()
def test_the_reference_is_told_the_likeliest_wrong_class_and_weighed_by_doubt(
    linear, packed, task, model
):
    batch = packed([task(rule=Unguided(), terms=(reference(2.0, 0, 0),)) for _ in range(4)])
    predictions = weave.evaluate([batch])[0].denoised
    assert batch.rows == 8
    x = batch.columns[:, 0]
    logits = x.flatten(1) @ linear.weights["shape"].T * (1 + batch.plans[0].sigma[0])
    wrong = logits[:, 1:].argmax(1)
    assert set(wrong.tolist()) == {0, 1}, "the case should see both alternatives chosen"
    doubt = 1 - logits.softmax(1)[:, 0]
    told = model.inputs(TOLD).of(wrong.tolist())
    t = x.new_full((4,), batch.plans[0].t[0])
    plan = batch.plans[0]
    raw = model.evaluate(plan.scale_in[0] * x, t, told)
    chosen = plan.skip[0] * x + plan.out[0] * raw
    expected = predictions[:4] + 2 * doubt.view(-1, 1, 1, 1) * (predictions[:4] - chosen)
    found = weave.guide(batch, predictions).denoised
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("fixed", [None, 2 * FIXED_ROWS_MULTIPLE])
def test_a_row_is_as_if_it_were_alone(model, packed, task, fixed):
    """With the model's own classifier, for rows of every kind beside any others."""
    heads = model.classifier.heads
    shapes, rare = [*heads].index("shape"), [*heads].index("minority")

    def numbers(place: int, number: int) -> tuple[int, ...]:
        return tuple(number if k == place else -1 for k in range(len(heads)))

    told = tuple(f"a small red {shape} on white" for shape in heads["shape"][1:])
    aims = [
        (),
        (ClassifierGradientTerm(EluCD(), numbers(shapes, 2), (3.0, 0, 0)),),
        (ClassifierGradientTerm(EluCD(joint_temperature=2), numbers(shapes, 1), (1.0, 0, 0)),),
        (ClassifierGradientTerm(Minority(), numbers(rare, 9), (2.0, 0, 0)),),
        (ReferenceGuidanceTerm(GradientFree(), numbers(shapes, 0), (2.0, 0, 0), told),),
    ]
    rules = [CFG(), CFG(), CFGPlusPlus(), Unguided(), CFG()]
    tasks = [task(rule=rule, terms=aim) for rule, aim in zip(rules, aims, strict=True)]
    batch = packed(tasks, fixed)
    together = guided(batch)
    for row, sequence in enumerate(batch.sequences):
        alone = guided(weave.pack(batch.lane, [sequence]))
        if fixed is None:
            torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(together[row], alone[0])


def test_images_are_bit_identical_alone_and_in_any_mix(linear, fixed_engine, task, run):
    aims = [(elucd(5, 5, 0),), (minority(3, 0, 0),), (reference(1, 1, 1),), ()]
    tasks = [task(terms=aim, seed=seed) for seed, aim in enumerate(aims)]
    together = run(fixed_engine, tasks).pixels()
    for one, pixels in zip(tasks, together, strict=True):
        assert np.array_equal(run(fixed_engine, [one]).pixels()[0], pixels)


def test_only_a_reference_costs_an_evaluation_and_only_where_it_acts(linear, engine, task, run):
    aims = [(), (elucd(1, 1, 1),), (reference(1, 0, 1),)]
    tasks = [task(rule=rule, terms=aim) for aim in aims for rule in (CFG(), Unguided())]
    spent = run(engine, tasks).results
    assert [spent[i].evaluations for i in range(6)] == [6, 3, 6, 3, 8, 5]
    assert not any(spent[i].saved for i in range(6))


def test_terms_go_with_perturbations_and_policies(linear, engine, task, run):
    one = task(settings=(PAG(),), policy="interval")
    one = replace(one, terms=(*one.terms, reference(1, 1, 1)))
    [result] = run(engine, [one]).results.values()
    assert result.saved > 0
    assert result.evaluations == 12 - result.saved


def test_strengths_of_zero_change_nothing(linear, engine, task, run):
    plain, led = run(engine, [task(), task(terms=(elucd(0, 0, 0),))]).pixels()
    assert np.array_equal(plain, led)


def test_a_classifier_that_fails_ends_its_own_images_alone(linear, engine, task, listen):
    linear.weights["shape"] = linear.weights["shape"] * float("nan")
    hearing = listen(2)
    engine.submit([task(terms=(elucd(1, 1, 1),)), task()], hearing)
    hearing.wait()
    assert isinstance(hearing.errors[0], RowFailed)
    assert [*hearing.results] == [1]


def test_a_model_without_a_classifier_cannot_be_asked(model):
    kept, model.classifier = model.classifier, None
    with pytest.raises(RuntimeError, match="model 'embedded' cannot classify"):
        model.classify(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    model.classifier = kept


@pytest.fixture
def led(trained: Any, task: Any) -> Callable[..., list[Any]]:
    """Tasks guided by the model's own classifier, as requests make them."""

    def make(term: Any, seeds: range, prompt: str) -> list[Any]:
        plain = task("dpm_solver_pp", steps=8, prompt=prompt, width=128, height=128)
        terms = terms_for((term,), plain.plan, trained, prompt=prompt)
        return [replace(plain, seed=seed, terms=terms) for seed in seeds]

    return make


def term_context(model: Any, pictures: list[Any], attribute: str) -> Tensor:
    """The classifier's probabilities for finished pictures."""
    pixels = torch.stack([torch.tensor(one).permute(2, 0, 1) for one in pictures])
    with torch.inference_mode():
        latents = model.encode_image(pixels / 127.5 - 1)
        clean = torch.ones(len(latents)), torch.zeros(len(latents))
        return model.classify(latents, *clean)[attribute].softmax(1)


def test_elucd_shows_what_the_prompt_leaves_unsaid(trained, trained_engine, led, run):
    """See docs/mathematics.md for measurements over more pictures and other attributes."""
    aim, prompt = {"background": "sunset"}, "a red circle on the left"
    number = trained.classifier.heads["background"].index("sunset")
    plain, towards = (
        run(trained_engine, led(EluCD(scale=scale, target=aim), range(4), prompt)).pixels()
        for scale in (0.0, 4.0)
    )
    before, after = (term_context(trained, p, "background")[:, number] for p in (plain, towards))
    assert (after >= before).all()
    assert after.mean() > before.mean() + 0.3
    shown = [sum(read_picture(one).background == "sunset" for one in p) for p in (plain, towards)]
    assert shown[1] > shown[0]


def test_minority_guidance_makes_what_the_classifier_finds_rare(trained, trained_engine, led, run):
    plain, towards = (
        run(trained_engine, led(Minority(scale=scale), range(4), "a red circle")).pixels()
        for scale in (0.0, 3.5)
    )
    tenths = torch.arange(1.0, 11.0)
    before, after = (term_context(trained, p, "minority") @ tenths for p in (plain, towards))
    assert after.mean() > before.mean() + 1
