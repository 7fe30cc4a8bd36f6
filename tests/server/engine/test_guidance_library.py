"""The documented loop draws what the server draws."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guidance
from guidance import APG, CFG, CFGPlusPlus, CFGRescale, CFGZeroStar, Rule
from server.engine.preview import to_uint8

DOCUMENT = Path(__file__).parents[3] / "docs" / "guidance_library.md"
CLOSE = 2
"""Steps of 255 that rounding may move a pixel."""


def example() -> str:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(
    "rule",
    [APG(scale=8), CFGPlusPlus(), CFGRescale(), CFGZeroStar(), CFG(scale=4)],
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
    one = task("ddim", rule, steps=found["STEPS"], seed=found["SEED"], prompt=prompt)
    [ours] = run(engine, [one]).pixels()
    theirs = to_uint8(found["picture"])[0]
    assert int(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max()) <= CLOSE


def test_the_document_names_what_the_package_exports() -> None:
    for name in re.findall(r"from guidance import (.*)", example())[0].split(", "):
        assert name in guidance.__all__
