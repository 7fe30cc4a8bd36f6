"""The documented loop draws the same pictures as the server."""

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


def drawn_by(code: str) -> tuple[dict[str, Any], Any]:
    """The example's description of its run, and the pixels of its picture."""
    found: dict[str, Any] = {}
    exec(code, found)  # noqa: S102 - ours
    told = {"prompt": "a small red circle on a white background", "width": 128, "height": 128}
    told |= {"steps": found["STEPS"], "seed": found["SEED"]}
    return told, to_uint8(found["picture"])[0].numpy().astype(int)


def test_the_documented_loop_gives_the_servers_picture(
    trained_engine: Any, task: Any, run: Any
) -> None:
    """The loop as documented, unchanged."""
    told, theirs = drawn_by(example())
    [ours] = run(trained_engine, [task("ddim", APG(scale=8), **told)]).pixels()
    assert int(np.abs(ours.astype(int) - theirs).max()) <= CLOSE


@pytest.mark.parametrize(
    ("rule", "written"),
    # One rule moves x; the other depends on the position in the run.
    [
        (CFGPlusPlus(), "CFGPlusPlus()"),
        (CFGZeroStar(), "CFGZeroStar()"),
        *([(CFGRescale(), "CFGRescale()"), (CFG(scale=4), "CFG(scale=4)")] if EVERY_CELL else []),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_documented_loop_takes_any_rule(
    engine: Any, thin_folder: Path, task: Any, run: Any, rule: Rule, written: str
) -> None:
    """It also takes any model."""
    code = example()
    for line, other in (
        ("from embedded import MODEL_FOLDER\n", f"MODEL_FOLDER = {str(thin_folder)!r}\n"),
        ("rule = APG(scale=8)\n", f"from guidance import *\nrule = {written}\n"),
    ):
        assert line in code
        code = code.replace(line, other)
    told, theirs = drawn_by(code)
    [ours] = run(engine, [task("ddim", rule, **told)]).pixels()
    assert int(np.abs(ours.astype(int) - theirs).max()) <= CLOSE


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
            t = torch.full((len(told) + 1,), float(model.network_time(plan.t[i])))
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
