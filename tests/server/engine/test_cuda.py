"""The engine on a GPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedded import MODEL_FOLDER
from server.models.loading import load_model

pytestmark = pytest.mark.cuda


def mix(task):
    return [
        task("unipc", "apg", "adaptive", seed=1),
        task("heun", "cfg_plus_plus", seed=2),
        task("euler_ancestral", "none", seed=3),
        task("dpm_solver_pp", "cfg", "interval", seed=4, previews=True),
    ]


@pytest.fixture(scope="module")
def on_gpu():
    return load_model(MODEL_FOLDER, name="embedded", device="cuda", dtype="float32")


def test_a_gpu_gives_the_pictures_that_the_cpu_gives(start, on_gpu, engine, task, run):
    on_cpu = run(engine, mix(task)).pixels()
    for ours, theirs in zip(run(start(model=on_gpu), mix(task)).pixels(), on_cpu, strict=True):
        # TF32 and other kernels; a picture, not its bits.
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 2


def test_on_a_gpu_deterministic_images_are_bit_identical_in_any_company(start, on_gpu, task, run):
    engine = start(model=on_gpu, deterministic=True)
    together = run(engine, mix(task)).pixels()
    alone = [run(engine, [one]).pixels()[0] for one in mix(task)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_finite_and_books_device_time(start, task, run, dtype):
    model = load_model(MODEL_FOLDER, name="embedded", device="cuda", dtype=dtype)
    engine = start(model=model)
    assert not run(engine, mix(task)).errors
    assert engine.measurements.denoise_s > 0
    assert model.dtype == getattr(torch, dtype)
