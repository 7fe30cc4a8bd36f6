"""In deterministic mode, threads of a CPU do not make a row's bits depend on its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.server.thin_model import save_thin_model

PROGRAM = """
import sys

import torch

from server.service.hosting import host
from server.settings import Settings

torch.set_num_threads(2)
settings = {"models": [sys.argv[1]], "device": "cpu", "deterministic": True, "row_budget": 8}
hosted = host(Settings.model_validate(settings), guessed_costs={8: 1.0})
hosted.engine.stop(0)
(model,) = hosted.models.values()
network = model.modules()["unet"]
rows = 16
x, text = torch.randn(12, 12, network.config.in_channels), torch.randn(64, 128)


@torch.inference_mode()
def at(place):
    latents, texts = torch.randn(rows, *x.shape), torch.randn(rows, *text.shape)
    times = torch.rand(rows) * 999
    latents[place], texts[place], times[place] = x, text, 500.0
    return network(latents.movedim(-1, 1), times, texts).sample[place]


first = at(0)
print(sum(torch.equal(first, at(place)) for place in range(rows)))
"""


def test_a_row_has_the_same_bits_at_every_place_of_a_batch(tmp_path: Path) -> None:
    """With fewer tokens than MKL's kernels take at once, they split a batch within a row."""
    save_thin_model(tmp_path / "thin")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "thin")]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "WEFT_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.split()[-1:] == ["16"], ended.stderr[-2000:]
