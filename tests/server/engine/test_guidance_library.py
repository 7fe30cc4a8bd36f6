"""The documented loop draws what the server draws."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import guidance
from guidance import (
    APG,
    CFG,
    CFGPlusPlus,
    CFGRescale,
    CFGZeroStar,
    Composed,
    PerpNeg,
    Rule,
    WeightedPrompt,
    guide,
)
from server.engine.state.noise import start_noise
from server.engine.tick.preview import to_uint8
from tests.covering import EVERY_CELL

DOCUMENT = Path(__file__).parents[3] / "docs" / "guidance_library.md"
CLOSE = 2
"""Steps of 255 that rounding may move a pixel."""


def example() -> str:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(
    "rule",
    # One with a memory, one that moves x, and one that asks where in the run it is.
    [
        APG(scale=8),
        CFGPlusPlus(),
        CFGZeroStar(),
        *([CFGRescale(), CFG(scale=4)] if EVERY_CELL else []),
    ],
    ids=lambda rule: rule.name,
)
def test_the_documented_loop_gives_the_servers_picture(
    engine: Any, task: Any, run: Any, rule: Rule
) -> None:
    """As written, and with other rules in APG's place."""
    code = example()
    assert "rule = APG(scale=8)\n" in code
    found: dict[str, Any] = {"OTHER_RULE": rule}
    exec(code.replace("rule = APG(scale=8)\n", "rule = OTHER_RULE\n"), found)  # noqa: S102 - ours
    prompt = "a small red circle on a white background"
    told = {"steps": found["STEPS"], "seed": found["SEED"], "prompt": prompt}
    one = task("ddim", rule, width=128, height=128, **told)
    [ours] = run(engine, [one]).pixels()
    theirs = to_uint8(found["picture"])[0].numpy()
    assert int(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max()) <= CLOSE


@pytest.mark.parametrize(
    "rule",
    [
        PerpNeg(scale=5),
        Composed(
            scale=3,
            prompts=(
                WeightedPrompt(prompt="a blue square", weight=2.0),
                WeightedPrompt(prompt="a yellow circle", weight=-1.0),
            ),
        ),
    ],
    ids=lambda rule: rule.name,
)
def test_each_prediction_reaches_a_rule_of_several_prompts_in_its_place(
    engine: Any, model: Any, task: Any, run: Any, rule: Rule
) -> None:
    one = task("ddim", rule, steps=4, negative_prompt="a green star")
    [ours] = run(engine, [one]).pixels()
    plan = one.plan
    told = [branch.text(one.prompt, one.negative_prompt) for branch in rule.branches]
    texts = model.inputs([one.prompt, *told])
    x = start_noise(one.seed, model.latent_shape(one.width, one.height))[None]
    with torch.inference_mode():
        for i, alpha, sigma in zip(
            range(4), plan.alpha.tolist(), plan.sigma.tolist(), strict=False
        ):
            t = torch.full((len(told) + 1,), float(model.told(plan.t[i])))
            raw = model.evaluate(x.expand(len(t), -1, -1, -1), t, texts)
            cond, *others = (alpha * x - sigma * raw).split(1)
            denoised = guide(rule, cond, others, x, alpha, sigma, progress=i / 4).denoised
            noise = (x - alpha * denoised) / sigma
            x = float(plan.alpha[i + 1]) * denoised + float(plan.sigma[i + 1]) * noise
        theirs = to_uint8(model.decode(x))[0].numpy()
    assert int(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max()) <= CLOSE


def test_the_document_names_what_the_package_exports() -> None:
    for name in re.findall(r"from guidance import (.*)", example())[0].split(", "):
        assert name in guidance.__all__
