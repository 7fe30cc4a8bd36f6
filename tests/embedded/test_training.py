"""Training runs, resumes and reports; the quality of the result is not tested here."""

import copy
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from embedded.autoencoder_training import (
    CROP_SIZE,
    AutoencoderSettings,
    CropPool,
    train_autoencoder,
    whiten,
)
from embedded.checkpoint import RunningAverage, TrainingState, metadata_of
from embedded.components import (
    WEAK_WIDTHS,
    Components,
    make_autoencoder,
    make_text_encoder,
    make_unet,
)
from embedded.precision import autocast
from embedded.report import Score, contact_sheet, table, unseen_scenes
from embedded.scenes import make_scene, render
from embedded.schedule import TrainingClock
from embedded.unet_training import UNetSettings, train_unet


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    clock = TrainingClock(steps=1000, minutes=None)
    assert clock.rate(1.0, warm_up=100, floor=0.1) == pytest.approx(0.01)
    clock.step = 500
    assert clock.rate(1.0, warm_up=100, floor=0.1) == pytest.approx(0.55)
    clock.step = 2000
    assert clock.progress == 1
    assert clock.rate(1.0, warm_up=100, floor=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)]
)
def test_a_cpu_trains_in_bfloat16_where_it_computes_in_it(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    with autocast("cpu"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.cuda
def test_a_gpu_trains_in_bfloat16_whatever_its_cpu() -> None:
    x = torch.ones(1, 2, device="cuda")
    with autocast("cuda"):
        assert nn.Linear(2, 2, device="cuda")(x).dtype == torch.bfloat16


def test_time_ends_a_run_as_well_as_steps() -> None:
    assert TrainingClock(steps=1000, minutes=1, spent_s=60).progress == 1
    assert TrainingClock(steps=None, minutes=None).progress == 0


def test_a_checkpoint_brings_everything_back(tmp_path: Path, mode_of_files: int) -> None:
    def fresh() -> TrainingState:
        module = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(module.parameters())
        return TrainingState({"model": module}, optimizer, TrainingClock(10, None))

    state = fresh()
    state.modules["model"](torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.clock.step = 4
    state.store(tmp_path / "state.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    assert stat.S_IMODE((tmp_path / "state.safetensors").stat().st_mode) == mode_of_files
    again = fresh()
    again.restore(tmp_path / "state.safetensors", "cpu")
    assert again.clock.step == 4
    for ours, theirs in zip(
        again.modules["model"].parameters(), state.modules["model"].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert again.optimizer.state_dict()["state"].keys() == {0, 1}


def test_the_average_forgets_its_start_quickly_and_its_past_slowly() -> None:
    source, average = nn.Linear(1, 1), nn.Linear(1, 1)
    averaging = RunningAverage(source, average, 0.99)
    averaging.update(0)
    assert torch.allclose(average.weight, source.weight, atol=0.2)
    before = average.weight.detach().clone()
    with torch.no_grad():
        source.weight.add_(1)
    averaging.update(10_000)
    expected = before + 0.01 * (source.weight - before)
    assert torch.allclose(average.weight, expected, atol=1e-6)


def test_crops_repeat_by_seed_and_mostly_hold_an_edge() -> None:
    first, second = (CropPool(3, "cpu", pictures=64).crops(64) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (64, 3, CROP_SIZE, CROP_SIZE)
    steps = (first[:, :, 1:] - first[:, :, :-1]).abs().amax((1, 2, 3))
    assert (steps > 0.2).float().mean() > 0.8


def test_whitening_is_exact_for_the_encoder_and_kind_to_the_decoder() -> None:
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    pictures = render([make_scene(2_000_000_000 + number) for number in range(16)])
    with torch.no_grad():
        whiten(autoencoder, "cpu", pictures=16)
        cells = autoencoder.encoder(pictures).movedim(1, 0).flatten(1)
    assert torch.allclose(cells.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(torch.cov(cells), torch.eye(4), atol=1e-2)


def autoencoder_settings(steps: int) -> AutoencoderSettings:
    return AutoencoderSettings(steps=steps, minutes=None, batch=2, pictures=4, device="cpu", seed=0)


def test_the_autoencoder_trains_and_resumes(tmp_path: Path, steps_made: list[object]) -> None:
    checkpoint = tmp_path / "autoencoder.safetensors"
    train_autoencoder(autoencoder_settings(1), checkpoint)
    assert metadata_of(checkpoint)["step"] == "1"
    train_autoencoder(autoencoder_settings(2), checkpoint)
    assert metadata_of(checkpoint)["step"] == "2"
    # Each run adapts its decoder in one more step.
    assert len(steps_made) == 2 + 2


def small_components() -> Components:
    return Components(make_autoencoder(), make_unet(WEAK_WIDTHS), make_text_encoder())


def test_the_unet_trains_publishes_and_resumes(tmp_path: Path, steps_made: list[object]) -> None:
    published: list[int] = []

    def publish(components: Components, step: int) -> None:
        published.append(step)
        assert not any(p.requires_grad for p in components.unet.parameters())

    def settings(steps: int) -> UNetSettings:
        return UNetSettings(
            steps=steps,
            minutes=None,
            batch=2,
            pictures=4,
            device="cpu",
            seed=0,
            publish_minutes=0 if steps == 1 else 60,
        )

    train_unet(small_components(), settings(1), tmp_path, publish)
    train_unet(small_components(), settings(2), tmp_path, publish)
    assert published == [1, 1, 2]
    assert len(steps_made) == 2
    frozen = small_components()
    frozen.text_encoder.requires_grad_(requires_grad=False)
    before = copy.deepcopy(frozen.text_encoder.state_dict())
    result = train_unet(frozen, settings(1), tmp_path / "frozen", publish)
    after = result.text_encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_score_counts_each_attribute_where_it_is_claimed() -> None:
    score = Score()
    score.add({"count": True, "shape": True})
    score.add({"count": True, "shape": False, "place": True})
    assert score.share() == 0.5
    assert score.share("shape") == 0.5
    assert score.share("place") == 1
    assert np.isnan(score.share("relation"))
    assert "| one | 2 | 50.0% | 100.0% | 50.0% |" in table({"one": score})


def test_unseen_captions_are_not_known_ones() -> None:
    scenes = unseen_scenes(1, 20, frozenset())
    known = frozenset(scene.caption for scene in scenes[:10])
    others = unseen_scenes(1, 20, known)
    assert not known & {scene.caption for scene in others}
    assert all(len(scene.truth.things) == 1 for scene in others)


def test_a_contact_sheet_reads_row_by_row() -> None:
    pictures = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    assert contact_sheet(pictures, columns=2)[..., 0].tolist() == [[0, 1], [2, 3]]
