"""The contract of all terms: declared points, independence of other images, one call for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from guidance import CFG, NAG, PAG, CFGNorm, EluCD, FeynmanKac, GradientFree, NegToMe, SkipTuning
from samplers.ddim import DDIM
from server.engine.engine import Engine
from server.engine.task import Group
from server.engine.terms.registry import TERMS
from server.engine.terms.term import Term
from server.models.classifier import LatentClassifier
from tests.server.by_hand import Asked, task, terms_for
from tests.server.toy_model import FACTS, SIDE, Neighbourly, run, started

SETTINGS: tuple[BaseModel, ...] = (
    SkipTuning(),
    NAG(),
    PAG(),
    NegToMe(stop=0.7),
    GradientFree(target={"shape": "circle"}),
    EluCD(target={"colour": "red"}),
    CFGNorm(),
    FeynmanKac(),
)
"""One for each term, in the order in which they act."""

POINTS = {"prepares": "prepare", "applies": "apply", "resamples": "resample"}

every_term = pytest.mark.parametrize("kind", TERMS, ids=lambda kind: kind.__name__)


class Seeing(Neighbourly):
    """A toy with a classifier of random weights."""

    def __init__(self) -> None:
        super().__init__()
        heads = {"shape": ("circle", "star"), "colour": ("red", "green")}
        torch.manual_seed(0)
        self.classifier = LatentClassifier(FACTS.latent_channels, heads, FACTS.revision).eval()
        self.classifier.requires_grad_(requires_grad=False)


MODEL = Seeing()


def asked(seed: int, *settings: BaseModel, **fields: Any) -> Asked:
    picture = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given: dict[str, Any] = {"sampler": DDIM(eta=1.0), "seed": seed, "steps": 4, **fields}
    bare = task(CFG(scale=3.0), **given)
    told = {"rule": bare.rule, "negative_prompt": "blue", "reference": picture}
    terms = terms_for(settings, bare.plan, MODEL, **told)
    return task(CFG(scale=3.0), **given, terms=terms)


@every_term
def test_a_term_says_at_which_points_it_is_called(kind: type[Term]) -> None:
    for declared, method in POINTS.items():
        assert getattr(kind, declared) == (method in vars(kind)), method
    assert any(getattr(kind, declared) for declared in POINTS)


def test_there_is_a_setting_for_each_term() -> None:
    terms = terms_for(SETTINGS, task().plan, MODEL)
    assert [type(term) for term in terms] == list(TERMS)


@pytest.fixture(scope="module")
def fixed_engine() -> Iterator[Engine]:
    made = started(MODEL, 24, deterministic=True)
    yield made
    made.stop(0)


def test_every_term_is_bit_identical_alone_and_among_all_others(fixed_engine: Engine) -> None:
    alone = [asked(seed, one) for seed, one in enumerate(SETTINGS[:-1])]
    everything = asked(20, *SETTINGS[:-1])
    group = Group()
    particles = [asked(30 + k, SETTINGS[-1], group=group) for k in range(2)]
    mix = [asked(9), *alone, everything, *particles]
    together = run(fixed_engine, mix)
    assert not together.errors, together.errors
    plain = run(fixed_engine, [asked(seed) for seed in range(len(alone))]).results
    for k, one in enumerate([*alone, everything], 1):
        [result] = run(fixed_engine, [one]).results.values()
        assert np.array_equal(result.pixels, together.results[k].pixels), type(one.terms[0])
        if one is not everything:
            assert not np.array_equal(result.pixels, plain[k - 1].pixels), type(one.terms[0])
    pair = run(fixed_engine, particles).results
    for k, result in pair.items():
        assert np.array_equal(result.pixels, together.results[len(mix) - 2 + k].pixels)
    assert all(result.effective for result in pair.values())


class Shifted(BaseModel, frozen=True):
    """A setting of another package."""

    by: float


class Shift(Term):
    """Counts its calls, and how many stages it has seen of each image."""

    made_from = Shifted
    applies = True
    called: list[int] = []  # noqa: RUF012 - shared by all instances

    def __init__(self, by: float) -> None:
        self.by = by

    @classmethod
    def of(cls, setting: Shifted, run: Any) -> Shift:
        return cls(setting.by)

    def acts(self, stage: int) -> bool:
        return stage != 1

    def begin(self, latents: Any, noise: torch.Tensor) -> int:
        return 0

    @classmethod
    def apply(cls, terms: Any, denoised: Any, predictions: Any, seen: Any) -> torch.Tensor:
        cls.called.append(len(terms))
        counts = [term.by * state for term, state in zip(terms, seen.states, strict=True)]
        seen.states[:] = [state + 1 for state in seen.states]
        return denoised + seen.factors(counts)


def test_a_term_is_called_once_for_all_images_and_its_state_goes_on_where_a_tick_succeeds() -> None:
    model = Seeing()
    engine = started(model, 8)
    try:
        tasks = [task(seed=k, steps=4, terms=(Shift(by),)) for k, by in enumerate((0.0, 0.5, 0.5))]
        plain = task(seed=1, steps=4)
        ear = run(engine, [*tasks, plain])
    finally:
        engine.stop(0)
    assert not ear.errors
    assert Shift.called == [3, 3, 3]
    assert not np.array_equal(ear.results[1].pixels, ear.results[3].pixels)
    unmoved = task(seed=0, steps=4)
    again = started(model, 8)
    try:
        [same] = run(again, [unmoved]).results.values()
    finally:
        again.stop(0)
    assert np.abs(same.pixels.astype(int) - ear.results[0].pixels).max() <= 1
