"""Schedules of flow-matching models equal diffusers', by size and number of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from samplers import NoiseSchedule
from server.errors import ModelMismatch
from server.models.flow_matching import FlowSchedules, empirical_mu

DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}
QWEN: dict[str, Any] = DYNAMIC | {
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def schedules(folder: Path, config: dict[str, Any], **options: Any) -> FlowSchedules:
    name = "FlowMatchEulerDiscreteScheduler"
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", name]}))
    return FlowSchedules(folder, 16, **options)


def levels(schedule: NoiseSchedule, steps: int) -> list[float]:
    return schedule.grid("trailing", steps).t[:-1].tolist()


@pytest.mark.parametrize(
    "config", [{"shift": 3.0}, DYNAMIC, QWEN, QWEN | {"time_shift_type": "linear"}]
)
@pytest.mark.parametrize(("width", "height", "steps"), [(1024, 1024, 4), (512, 768, 9)])
def test_levels_are_those_of_diffusers(
    tmp_path: Path, config: dict[str, Any], width: int, height: int, steps: int
) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    own = scheduler.config
    ends = own.base_image_seq_len, own.max_image_seq_len, own.base_shift, own.max_shift
    mu = calculate_shift(width * height // 256, *ends)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = schedules(tmp_path, config)(width, height, steps)
    np.testing.assert_allclose(levels(ours, steps), scheduler.sigmas[:-1], rtol=1e-6)


def test_published_figures(tmp_path: Path) -> None:
    flux = schedules(tmp_path, DYNAMIC)(1024, 1024, 4)
    klein = schedules(tmp_path, DYNAMIC, mu=empirical_mu)(1024, 1024, 4)
    qwen = schedules(tmp_path, QWEN)(1024, 1024, 4)
    assert np.round(levels(flux, 4), 4).tolist() == [1, 0.9045, 0.7595, 0.5128]
    assert np.round(levels(klein, 4), 4).tolist() == [1, 0.9674, 0.9081, 0.7672]
    assert np.round(levels(qwen, 4), 4).tolist() == [1, 0.7667, 0.4556, 0.02]


def test_mu_of_flux_2_follows_size_and_steps() -> None:
    for tokens, steps in ((64, 4), (4096, 4), (4096, 50), (4300, 28), (4301, 28), (9000, 4)):
        expected = compute_empirical_mu(tokens, steps)
        assert empirical_mu(tokens, steps) == pytest.approx(expected, rel=1e-12)


def test_a_schedule_is_one_object_for_all_that_it_does_not_depend_on(tmp_path: Path) -> None:
    by_size = schedules(tmp_path, DYNAMIC)
    assert by_size(512, 768, 4) is by_size(768, 512, 9)
    assert by_size(512, 768, 4) is not by_size(512, 512, 4)
    by_both = schedules(tmp_path, QWEN)
    assert by_both(512, 768, 4) is not by_both(512, 768, 9)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"invert_sigmas": True}, "has invert_sigmas 'True'; only false is supported"),
        ({"use_karras_sigmas": True}, "each request names its sampler and spacing"),
        (DYNAMIC | {"time_shift_type": "cubic"}, "allowed are exponential and linear"),
        ({"shift": [3]}, r"has the shift '\[3\]'; a number from 0.01 to 100 is allowed"),
        (DYNAMIC | {"max_shift": 500}, "has the max_shift '500'"),
        (DYNAMIC | {"max_image_seq_len": 256}, "must be below max_image_seq_len"),
        (DYNAMIC | {"time_shift_type": "linear", "base_shift": 0.02}, "shift is -"),
        ({"num_train_timesteps": 10}, "only 1000 is allowed"),
    ],
)
def test_configs_that_no_published_model_has_are_refused(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    with pytest.raises((ModelMismatch, ValueError), match=says):
        schedules(tmp_path, config)


def test_a_steep_shift_has_levels_at_every_size(tmp_path: Path) -> None:
    steep = schedules(tmp_path, DYNAMIC | {"max_image_seq_len": 257})(8192, 8192, 4)
    first, *others = levels(steep, 4)
    assert first == 1
    assert (np.diff(others) < 0).all()
