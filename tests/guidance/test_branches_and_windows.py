"""The conditioning of each branch, and where perturbations act."""

import math
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler
from diffusers.pipelines.pag.pag_utils import PAGMixin

from guidance import EMPTY, NEGATIVE, Branch, DiffusionLevels, FreeU, SkipTuning
from guidance.autoguidance import Autoguidance
from guidance.edits import (
    BackboneScales,
    BlurredQueries,
    IdentityAttention,
    SkippedBlocks,
    SkipScales,
    WeakModel,
)
from guidance.pag import PAG
from guidance.seg import SEG
from guidance.slg import SLG
from guidance.window import Window

NOISE_RATIO = np.array([np.inf, 8.0, 2.0, 0.5])
PROGRESS = np.arange(4) / 4


@pytest.mark.parametrize(
    ("branch", "text"),
    [
        (NEGATIVE, "blurry"),
        (EMPTY, None),
        (Branch("prompt"), "a cat"),
        (Branch("own", "a dog"), "a dog"),
    ],
    ids=str,
)
def test_a_branch_tells_the_network_its_text(branch: Branch, text: str | None) -> None:
    assert branch.text("a cat", "blurry") == text


def test_without_a_negative_prompt_a_branch_tells_the_unconditional() -> None:
    assert NEGATIVE.text("a cat", None) is None
    assert NEGATIVE.text("a cat", "") == ""


def test_a_window_is_everywhere_unless_bounded() -> None:
    assert Window().contains(NOISE_RATIO, PROGRESS).all()
    assert Window(low=0.5, high=8).contains(NOISE_RATIO, PROGRESS).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert Window(start=0.25, stop=0.75).contains(NOISE_RATIO, PROGRESS).tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_a_perturbation_acts_in_its_window_unless_it_has_no_strength() -> None:
    assert SLG().evaluates(NOISE_RATIO, np.array([0, 0.01, 0.19, 0.2])).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert not PAG(scale=0).evaluates(NOISE_RATIO, PROGRESS).any()


def test_each_perturbation_changes_the_network_in_its_own_way() -> None:
    layers = ("middle", "up_blocks.1")
    assert PAG(layers=layers).edit == IdentityAttention(layers)
    assert SEG(layers=layers).edit == BlurredQueries(layers, math.inf)
    assert SEG(sigma=2.5).edit == BlurredQueries(("middle",), 2.5)
    assert SLG(layers=layers).edit == SkippedBlocks(layers)
    assert Autoguidance().edit == WeakModel()
    assert SkipTuning(bottom=0.7).edit == SkipScales((0.7, 1.0))
    assert FreeU(b1=1.1).edit == BackboneScales((1.1, 1.4), (0.9, 0.2))


def test_mid_is_another_name_of_middle() -> None:
    assert PAG(layers=("mid", "up_blocks.1")).layers == ("middle", "up_blocks.1")
    assert SEG.model_validate({"layers": ["mid"]}) == SEG()


def test_strength_falls_as_in_diffusers_pipelines() -> None:
    """Compared with diffusers' own method, at the timesteps of its own schedule."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.numpy()
    theirs: Any = PAGMixin()
    theirs._pag_scale, theirs._pag_adaptive_scale, theirs.pag_applied_layers = 3.0, 0.004, ["mid"]
    expected = [theirs._get_pag_scale(t) for t in timesteps]
    ones = np.ones(20)
    levels = DiffusionLevels(ones, ones, timesteps / 999, ones)
    strengths = PAG(scale=3, adaptive_scale=0.004).strengths(levels)
    np.testing.assert_allclose(strengths, expected, rtol=1e-12, atol=1e-12)
    assert 0 < (strengths == 0).sum() < 10
    assert (PAG(scale=3).strengths(levels) == 3).all()
    assert (SLG(scale=2).strengths(levels) == 2).all()
