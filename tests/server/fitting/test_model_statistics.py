"""`weft ems`: the command, and what a hosted model's statistics are computed from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner, Result

from embedded import MODEL_FOLDER
from embedded.scenes import make_scene, render, to_pixels
from samplers import Statistics
from samplers.statistics import schedule_fingerprint
from server.cli import app
from server.errors import InvalidRequest
from server.fitting.model_statistics import Order, Size, _denoisers, mixture_of, run_order
from server.fitting.samples import PROMPTS, draw, prompts_for, read_pictures
from server.models.folder import statistics_file
from server.models.hosted import HostedModel
from server.models.loading import load_model


@pytest.fixture(scope="module")
def model(thin_folder: Path) -> HostedModel:
    made = load_model(thin_folder, name="m", device="cpu", dtype="float32")
    made.make_differentiable()
    return made


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three captioned pictures whose size differs from the model's."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    scenes = [make_scene(k) for k in range(3)]
    for k, pixels in enumerate(to_pixels(render(scenes))):
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(scenes[k].caption + "\n")
    return folder


def weft(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["ems", *arguments])


def test_a_hosted_models_denoiser_can_be_differentiated_in_x_and_t(model: HostedModel) -> None:
    """Compared with central differences of both branches, each sample with its own prompt."""
    prompts = ["a red circle", "two blue squares", "a star"]
    denoise = _denoisers(model, prompts, branches=2)(range(1, 3))
    with torch.no_grad():
        clean = model.encode_image(render([make_scene(1), make_scene(2)]))
    noise, direction = torch.randn(2, *clean.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (float(part) for part in model.default_schedule.level(np.array(400.5)))
    x = alpha * clean + sigma * noise
    t, t_direction = torch.full((2,), 400.5), torch.full((2,), 30.0)
    h = 1e-3
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, slope = torch.func.jvp(denoise, (x, t), (direction, t_direction))[:2]
        above = denoise(x + h * direction, t + h * t_direction)
        below = denoise(x - h * direction, t - h * t_direction)
        alone = _denoisers(model, prompts, branches=1)(range(1, 2))(x[:1], t[:1])
        v = model.evaluate(x, t, model.inputs([None, None]))
    difference = (above - below) / (2 * h)
    # Smaller steps show the rounding of float32; at this one the network's ripples show.
    assert (slope - difference).norm() < 0.05 * difference.norm()
    assert torch.allclose(value[0, :1], alone[0], atol=1e-4)
    # The model predicts v: D = alpha x - sigma v.
    assert torch.allclose(value[1], alpha * x - sigma * v, atol=1e-4)


def test_guidance_is_a_sum_of_branches() -> None:
    assert mixture_of(7.5).weights == (7.5, -6.5)
    assert (mixture_of(1.0).rule, mixture_of(1.0).weights) == ("none", (1.0, 0.0))


def test_pictures_are_read_with_their_captions_and_repeated(
    model: HostedModel, pictures: Path
) -> None:
    samples = read_pictures(model, pictures, 5, chunk=2)
    assert samples.latents.shape == (5, *model.latent_shape(128, 128))
    assert torch.equal(samples.latents[3], samples.latents[0])
    assert list(samples.prompts) == [make_scene(k % 3).caption for k in range(5)]
    with torch.no_grad():
        exact = model.encode_image(render([make_scene(0)]))
    assert (samples.latents[0] - exact[0]).abs().mean() < 0.2 * exact.abs().mean()


def test_pictures_that_cannot_serve_are_refused(
    model: HostedModel, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="contains no pictures"):
        read_pictures(model, tmp_path / "empty", 1, chunk=1)
    (pictures / "1.txt").unlink()
    with pytest.raises(InvalidRequest, match=r"no caption '1.txt' for '1.png'"):
        read_pictures(model, pictures, 3, chunk=1)
    (pictures / "0.png").write_bytes(b"no picture")
    with pytest.raises(InvalidRequest, match=r"'0.png' cannot be read"):
        read_pictures(model, pictures, 1, chunk=1)


def test_prompts_come_from_a_file_or_suit_the_model(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n a cat \n")
    assert prompts_for(tmp_path, file) == ["a dog", "a cat"]
    file.write_text("\n")
    with pytest.raises(InvalidRequest, match="contains no lines"):
        prompts_for(tmp_path, file)
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(
        InvalidRequest, match=r"prompts has .*prompts.txt', which is not UTF-8 text"
    ):
        prompts_for(tmp_path, file)
    assert prompts_for(tmp_path, None) == PROMPTS
    own = prompts_for(MODEL_FOLDER, None)
    assert len(own) > 1000
    assert own[0] != own[1]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_model_draws_each_sample_whatever_its_chunk(model: HostedModel, scale: float) -> None:
    def drawn(chunk: int) -> torch.Tensor:
        told: list[int] = []
        samples = draw(
            model,
            ["a red circle", "a blue star"],
            3,
            scale=scale,
            steps=3,
            chunk=chunk,
            on_progress=told.append,
        )
        assert told[-1] == 3
        assert list(samples.prompts) == ["a red circle", "a blue star", "a red circle"]
        return samples.latents

    assert torch.allclose(drawn(1), drawn(2), atol=1e-4)


def test_the_command_goes_on_where_it_was_stopped_and_leaves_nothing_but_the_files(
    tmp_path: Path, pictures: Path, thin_folder: Path, model: HostedModel
) -> None:
    folder = shutil.copytree(
        thin_folder, tmp_path / "model", ignore=shutil.ignore_patterns("ems-*")
    )
    there = set((folder / "weft").iterdir())

    def stop(stage: str, done: int, total: int) -> None:
        assert total == 9
        if done == 5:
            raise KeyboardInterrupt

    order = Order(folder, [3.0, 1.5], Size(points=3, samples=3, chunk=2), "cpu", pictures)
    with pytest.raises(KeyboardInterrupt):
        run_order(order, stop)
    given = ["-m", str(folder), "--scale", "3", "--scale", "1.5", "--points", "3", "--chunk", "2"]
    # With another number of samples than in the kept sums, nothing is made.
    refused = weft(*given, "--data", str(pictures), "--samples", "2")
    assert refused.exit_code == 2
    assert "samples is 2, but checkpoint" in refused.output
    done = weft(*given, "--data", str(pictures), "--samples", "3")
    assert done.exit_code == 0, done.output
    files = [statistics_file(folder, "cfg", 3.0), statistics_file(folder, "cfg", 1.5)]
    assert done.stdout.split() == [str(file) for file in files]
    assert set((folder / "weft").iterdir()) == there | set(files)
    found = Statistics.load(files[1])
    assert found.identity is not None
    found.identity.check(model.facts.denoiser, schedule_fingerprint(model.default_schedule))
    assert (found.identity.scale, found.identity.samples) == (1.5, 3)


def test_the_command_lets_the_model_draw(tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    given = ["--guidance", "none", "--points", "3", "--samples", "2", "--steps", "2"]
    done = weft(*given, "--out", str(out))
    assert done.exit_code == 0, done.output
    found = Statistics.load(out)
    assert found.identity is not None
    assert (found.identity.rule, found.identity.scale) == ("none", 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--guidance", "apg", "--scale", "3"], "statistics can be computed for 'cfg' or 'none'"),
        (["--guidance", "none", "--scale", "3"], "scale has no effect with guidance 'none'"),
        ([], "scale is missing; guidance 'cfg' needs one"),
        (["--scale", "2", "--scale", "3", "--out", "x"], "out names one file"),
        (["--scale", "2", "--model", "/nowhere"], "has no model_index.json"),
    ],
)
def test_what_the_command_cannot_do_is_refused(arguments: list[str], says: str) -> None:
    done = weft(*arguments)
    assert done.exit_code == 2
    assert says in done.output
