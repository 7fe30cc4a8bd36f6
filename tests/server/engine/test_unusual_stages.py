"""Stages that are not linear maps, and noise levels that rise within a run."""

import numpy as np
import pytest
import torch

from samplers.restart import Restart
from samplers.score_sde_pc import ScoreSDEPC
from tests.server.engine.conftest import SIDE
from tests.server.engine.test_engine import CLOSE, apart, by_hand, picture

COMPANY = ("unipc", "heun", "euler_ancestral")


def test_a_langevin_row_is_the_same_alone_in_company_and_by_the_library_loop(
    fixed_engine, model, task, run
):
    needle = task(ScoreSDEPC(corrector_steps=2), steps=3, seed=5)
    [alone] = run(fixed_engine, [needle]).pixels()
    company = [task(sampler, steps=3, seed=k) for k, sampler in enumerate(COMPANY)]
    other = task(ScoreSDEPC(snr=0.4), steps=3, seed=9)
    *_, together = run(fixed_engine, [*company, other, needle]).pixels()
    assert np.array_equal(alone, together)
    assert apart(alone, by_hand(model, needle)) <= CLOSE


def test_linear_rows_keep_their_bits_beside_a_langevin_row(fixed_engine, task, run):
    linear = [task(sampler, steps=3, seed=k) for k, sampler in enumerate(COMPANY)]
    alone = [run(fixed_engine, [one]).pixels()[0] for one in linear]
    together = run(fixed_engine, [task("score_sde_pc", steps=3), *linear]).pixels()[1:]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_langevin_move_acts(engine, task, run):
    gentle, strong = (task(ScoreSDEPC(snr=snr), steps=4) for snr in (0.01, 0.5))
    first, second = run(engine, [gentle, strong]).pixels()
    assert apart(first, second) > 20


@pytest.mark.parametrize("sampler", [Restart(restarts=2), ScoreSDEPC(snr=0.16)])
def test_inpainting_keeps_what_it_was_to_keep_where_levels_rise_or_stay(engine, task, run, sampler):
    mask = torch.zeros(SIDE, SIDE)
    mask[24:72, 24:72] = 1
    heard = run(engine, [task(sampler, image=picture(), mask=mask, steps=4, strength=1.0)])
    [pixels] = heard.pixels()
    original = ((picture() + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
    kept = mask.numpy() == 0
    assert np.array_equal(pixels[kept], original[kept])
    assert not np.array_equal(pixels[~kept], original[~kept])


def test_a_restart_reports_the_steps_of_all_its_descents(engine, task, run):
    sampler = Restart(base="euler", restarts=2)
    heard = run(engine, [task(sampler, rule="none", steps=4)])
    assert heard.steps == [(0, k, 6) for k in range(1, 7)]
    assert heard.results[0].evaluations == sampler.evaluations(4) == 6
