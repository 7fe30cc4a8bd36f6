"""The README's examples run as shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samplers import NoiseSchedule, Sampler
from samplers.ddim import DDIM
from samplers.testing import check_sampler
from samplers.timesteps import LogSNR, Trailing
from server.requests.schema import GenerateRequest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def indented_block(containing: str) -> str:
    blocks = re.findall(r"(?:^    .*\n|^\n)+", README, re.MULTILINE)
    [found] = [block for block in blocks if containing in block]
    return "\n".join(line.removeprefix("    ") for line in found.splitlines())


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block of our own README, without the future imports of this file."""
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)  # noqa: S102
    return names


def test_the_sampler_of_the_readme_is_a_sampler():
    sampler = run(indented_block("class MyEuler"), {})["MyEuler"]()
    assert isinstance(sampler, Sampler)
    grid = NoiseSchedule.vp_linear().grid(Trailing(), 7)
    assert np.allclose(sampler.plan(grid).tables, DDIM().plan(grid).tables, rtol=1e-12, atol=1e-12)
    check_sampler(sampler)


def test_the_library_example_of_the_readme_runs():
    import torch

    mean, deviation = 0.3, 0.5
    schedule = NoiseSchedule.vp_linear()

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = (float(v) for v in schedule.level(np.array(t)))
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    start = {"denoise": denoise, "x_start": torch.randn(64, dtype=torch.float64)}
    names = run(indented_block("integrate(UniPC"), start)
    # The exact flow of a Gaussian, from samplers.md's closed form.
    grid = schedule.grid(LogSNR(), 20, 1.0, 1e-3)
    y = names["x_start"] / grid.alpha[0]
    spread = [deviation**2 + (s / a) ** 2 for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    exact = grid.alpha[-1] * (mean + (y - mean) * (spread[-1] / spread[0]) ** 0.5)
    assert (names["x"] - exact).abs().max() < 2e-3


@pytest.mark.parametrize("body", re.findall(r"-d '(\{.*?\})'", README, re.DOTALL))
def test_a_request_of_the_readme_is_valid(body):
    assert GenerateRequest.model_validate(json.loads(body)).prompt


def test_the_request_that_make_serve_suggests_is_valid():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    [body] = re.findall(r"-d '(\{.*?\})'", makefile)
    request = GenerateRequest.model_validate(json.loads(body.replace('\\"', '"')))
    assert request.guidance is not None
    recommended = {"name": "apg", "scale": 4.0}
    assert request.guidance.model_dump().items() >= recommended.items()


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_readme_names_every_sampler_spacing_rule_and_policy():
    from server.requests.schema import CHOICES

    for kind in CHOICES.values():
        for name in kind:
            assert f"`{name}`" in README, name
