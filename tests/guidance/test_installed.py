"""Classes of other packages that cannot be used are named, and left out."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Literal

import pytest
from pydantic import Field

from guidance import Rule
from guidance.cfg import CFG
from guidance.installed import with_installed
from guidance.parts import PARTS
from guidance.registry import BESIDE_RULES


class Political(Rule, frozen=True):
    name: Literal["political"] = "political"
    policy: float = Field(default=1.0, description="Would hide the policy of a request.")


def test_a_rule_whose_parameter_is_another_field_of_guidance_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = EntryPoint("political", f"{__name__}:Political", "weft.guidance_rules")
    monkeypatch.setattr("guidance.installed.entry_points", lambda **_: [entry])
    assert with_installed("weft.guidance_rules", Rule, (CFG,), BESIDE_RULES) == (CFG,)
    assert "'political' of an unknown distribution is left out" in caplog.text
    assert "its parameter 'policy' has the name of another field" in caplog.text


def test_every_part_of_guidance_is_reserved() -> None:
    assert tuple(part.field for part in PARTS) == BESIDE_RULES
