"""The terms that a request's guidance is turned into, and what they declare for each stage."""

from __future__ import annotations

import numpy as np
import pytest

from guidance import PAG, SEG, EluCD, FeynmanKac, GradientFree, NegToMe, SkipTuning
from guidance.parts import PARTS
from samplers import Plan
from samplers.ddim import DDIM
from server.engine.terms.classifier import ClassifierGradientTerm, ReferenceGuidanceTerm
from server.engine.terms.levels import levels_of
from server.engine.terms.registry import TERMS
from server.engine.terms.term import RowSpec
from server.errors import InvalidRequest
from server.models.classifier import LatentClassifier
from server.models.prompt_editing import Timeline, written_in
from tests.server.by_hand import terms_for
from tests.server.toy_model import FACTS, SCHEDULE, Toy

HEADS = {"shape": ("circle", "star"), "colour": ("red", "green", "blue")}


@pytest.fixture
def model() -> Toy:
    toy = Toy()
    toy.classifier = LatentClassifier(FACTS.latent_channels, HEADS, FACTS.revision)
    return toy


@pytest.fixture
def plan() -> Plan:
    return DDIM().plan(SCHEDULE.grid("trailing", 4))


def test_every_part_of_guidance_but_the_policy_has_its_term() -> None:
    for part in PARTS:
        for kind in part.kinds:
            found = [term for term in TERMS if issubclass(kind, term.made_from)]
            assert len(found) == (part.field != "policy"), kind


def test_terms_stand_in_the_order_in_which_they_act(plan: Plan) -> None:
    asked = (FeynmanKac(), NegToMe(), SEG(), SkipTuning(), PAG())
    kinds = [type(term) for term in terms_for(asked, plan)]
    assert kinds == sorted(kinds, key=TERMS.index)
    assert len(kinds) == 5


def test_a_perturbation_asks_for_its_row_where_it_acts_and_never_at_scale_nothing(
    plan: Plan,
) -> None:
    early, none = terms_for((PAG(stop=0.5), PAG(scale=0.0)), plan, prompt="a star")
    assert [early.acts(stage) for stage in range(4)] == [True, True, False, False]
    assert early.rows(0) == (RowSpec("a star", (PAG().edit,)),)
    assert not any(none.acts(stage) for stage in range(4))


def test_a_gradient_has_the_numbers_of_the_classes_and_acts_in_its_window(
    model: Toy, plan: Plan
) -> None:
    asked = EluCD(target={"colour": "blue"}, stop=0.5)
    [term] = terms_for((asked,), plan, model)
    assert isinstance(term, ClassifierGradientTerm)
    assert term.targets == (-1, 2)
    expected = asked.strengths(levels_of(plan, SCHEDULE))
    assert np.array_equal(term.strengths, expected * [1, 1, 0, 0])
    assert not term.rows(0)


def test_a_reference_comes_with_the_prompts_it_is_chosen_among(model: Toy, plan: Plan) -> None:
    asked = GradientFree(target={"shape": "star", "colour": "red"})
    [term] = terms_for((asked,), plan, model, prompt="a red star")
    assert isinstance(term, ReferenceGuidanceTerm)
    assert term.targets == (1, 0)
    assert term.texts == ("a red circle", "a green star", "a blue star")
    assert len(term.rows(0)) == 1
    changing = written_in("automatic1111", "a red [circle:star:1]", Timeline(plan.evaluations))
    with pytest.raises(InvalidRequest, match="is incompatible with prompt editing"):
        terms_for((asked,), plan, model, prompt=changing)
