"""Composed prompts compared with products of Gaussians, which have a closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guidance import NEGATIVE, Branch
from guidance.cfg import CFG
from guidance.composed import Composed, WeightedPrompt
from samplers import NoiseSchedule, integrate
from samplers.gaussian import GaussianDenoiser
from samplers.timesteps import LogSNR
from samplers.unipc import UniPC
from tests.guidance.cases import apply, draw


def composed(scale: float, *weights: float) -> Composed:
    prompts = [{"prompt": f"thing {i}", "weight": weight} for i, weight in enumerate(weights)]
    return Composed.model_validate({"scale": scale, "prompts": prompts})


@given(
    scale=st.floats(0, 20),
    weights=st.lists(st.floats(-20, 20).filter(bool), min_size=1, max_size=8),
    seed=st.integers(0, 100),
)
def test_it_is_the_sum_of_weighted_differences(
    scale: float, weights: list[float], seed: int
) -> None:
    rows = draw(2, seed, branches=1 + len(weights))
    base = rows.others[:, 0]
    expected = base + scale * (rows.cond - base)
    for weight, other in zip(weights, rows.others[:, 1:].unbind(1), strict=True):
        expected = expected + weight * (other - base)
    torch.testing.assert_close(apply(composed(scale, *weights), rows).denoised, expected)


def test_alone_it_is_cfg() -> None:
    rows = draw(3)
    plain = apply(CFG(scale=6), rows).denoised
    torch.testing.assert_close(apply(composed(6), rows).denoised, plain)
    torch.testing.assert_close(apply(composed(6, 0.0, 0.0), rows).denoised, plain)


def test_each_prompt_that_has_weight_is_a_branch() -> None:
    assert composed(4, 2, 0, -3).branches == (
        NEGATIVE,
        Branch("own", "thing 0"),
        Branch("own", "thing 2"),
    )
    assert composed(4).branches == (NEGATIVE,)
    assert composed(1).branches == composed(1, 0).branches == ()
    assert composed(1, 2).branches == (NEGATIVE, Branch("own", "thing 0"))


def test_rows_have_weights_of_their_own() -> None:
    rows = draw(2, branches=3)
    rules = [composed(4, 2, -1), composed(3, 0, 5, 1)]
    together = Composed.combine(rows, Composed.parameters(rules, rows.x[:1])).denoised
    for i, rule in enumerate(rules):
        torch.testing.assert_close(together[i], apply(rule, rows).denoised[i])


def test_the_run_lands_on_the_product_of_gaussians() -> None:
    """The product is p (p1 / p)^1.5 (p2 / p)^2; for equal deviations, differences of means add up.

    Noise shrinks all these differences equally, so at every level the composed score is that of the
    noised product, whose flow is known exactly.
    """
    schedule = NoiseSchedule.vp_linear()
    plan = UniPC(order=3).plan(schedule.grid(LogSNR(), 100, t_end=1e-3))
    empty, first, second = (GaussianDenoiser(schedule, mean, 0.5) for mean in (0.1, 0.9, -0.3))
    product = GaussianDenoiser(schedule, 0.1 + 1.5 * 0.8 - 2 * 0.4, 0.5)
    rule = composed(1.5, 2.0)

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        rows = draw(1)
        others = torch.stack([empty(x, t), second(x, t)], 1)
        return apply(rule, replace(rows, cond=first(x, t), others=others, x=x)).denoised

    start = torch.linspace(-2, 2, 5, dtype=torch.float64).view(1, 1, 1, 5)
    landed = integrate(plan, denoise, start)
    expected = product.transport(start, float(plan.t[0]), float(plan.t[-1]))
    np.testing.assert_allclose(landed.numpy(), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([{"prompt": "x"}] * 9, "at most 8 items"),
        ([{"prompt": "x", "weight": 101}], "less than or equal to 100"),
        ([{"prompt": "x", "weight": float("nan")}], "finite number"),
        ([{"weight": 1}], "Field required"),
        ([{"prompt": "x", "colour": "red"}], "Extra inputs are not permitted"),
    ],
)
def test_strange_prompts_are_refused(prompts: object, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Composed.model_validate({"prompts": prompts})


def test_a_prompt_has_a_weight_by_default() -> None:
    assert WeightedPrompt(prompt="a red circle").weight == 4


def test_its_prompts_are_rewritten_and_nothing_else() -> None:
    rule = composed(2.0, 3.0)
    read = rule.rewritten(str.upper)
    assert [one.prompt for one in read.prompts] == [one.prompt.upper() for one in rule.prompts]
    assert read.rewritten(lambda _: rule.prompts[0].prompt) == rule
    assert CFG(scale=3.0).rewritten(str.upper) == CFG(scale=3.0)
