"""Distillation of the embedded model: mathematics, training and the shipped models."""

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from embedded import ADAPTER_FILE, MODEL_FOLDER, STUDENT_FOLDER
from embedded.checkpoint import metadata_of
from embedded.components import (
    load_components,
    make_components,
    make_few_step_scheduler,
    make_scheduler,
    make_unet,
)
from embedded.consistency import AlphaSigma, consistency, distance, solved
from embedded.consistency_training import Distillation, distil, student_of
from embedded.decoder_training import DecoderSettings, deepened, train_decoder
from embedded.low_rank import add_low_rank, fuse, save_low_rank
from embedded.report import Sampling, score_model, unseen_scenes
from embedded.unet_training import corpus_of, training_captions

ALPHAS = make_scheduler().alphas_cumprod
LEVELS = AlphaSigma.of(ALPHAS, "cpu")


def test_the_consistency_function_is_the_one_that_diffusers_scheduler_applies() -> None:
    scheduler: Any = make_few_step_scheduler()
    scheduler.set_timesteps(50, original_inference_steps=50)
    generator = torch.Generator().manual_seed(0)
    for t in (999, 499, 19):
        x, v = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
        scheduler._step_index = None
        theirs = scheduler.step(v, t, x, generator=generator).denoised
        ours = consistency(v, x, torch.tensor([t, t]), LEVELS)
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_consistency_function_leaves_a_clean_picture_as_it_is() -> None:
    x, v = torch.randn(2, 2, 4, 3, 3)
    assert torch.equal(consistency(v, x, torch.tensor([-1, -1]), LEVELS), x)


def test_the_solver_follows_the_flow_of_a_normal_distribution_at_first_order() -> None:
    """For data of deviation s, x scales along the flow as the deviation of the noisy data."""
    s = 0.7

    def exact(x: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = LEVELS.at(times)
        clean = alpha * s**2 * x / (alpha**2 * s**2 + sigma**2)
        return (alpha * x - clean) / sigma

    def deviation(time: int) -> float:
        alpha, sigma = LEVELS.at(torch.tensor([time]))
        return float((alpha**2 * s**2 + sigma**2).sqrt())

    x, times = torch.ones(1, 1, 1, 1), torch.tensor([799])
    errors: list[float] = []
    for steps in (10, 20, 40):
        there, reached = solved(exact, x, times, 400, steps, LEVELS)
        assert reached.tolist() == [399]
        errors.append(abs(float(there) - deviation(399) / deviation(799)))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.3)
    there, reached = solved(exact, x, torch.tensor([99]), 200, 40, LEVELS)
    assert reached.tolist() == [-1]
    assert float(there) == pytest.approx(s / deviation(99), abs=0.02)


@pytest.mark.parametrize("kind", ["cauchy", "huber"])
def test_distances_are_quadratic_nearby_and_forgive_what_is_far_off(
    kind: Literal["cauchy", "huber"],
) -> None:
    def of(difference: float) -> float:
        there = torch.full((1, 4, 2, 2), difference, dtype=torch.float64)
        return float(distance(there, torch.zeros_like(there), kind, 0.2))

    assert of(0) == 0
    assert of(0.002) / of(0.001) == pytest.approx(4, rel=1e-3)
    assert of(20) / of(10) < 2.1


def settings(steps: int) -> Distillation:
    return Distillation(
        steps=steps,
        minutes=None,
        batch=2,
        rate=1e-3,
        scales=(2.0, 7.0),
        intervals=6,
        solver_steps=2,
        loss="cauchy",
        width=0.2,
        target_decay=0.95,
        average_decay=0.999,
        device="cpu",
        seed=0,
        publish_minutes=60,
    )


def test_the_student_begins_as_its_teacher_at_every_scale() -> None:
    teacher = make_unet().eval()
    student = student_of(teacher).eval()
    x, states = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 128)
    t = torch.tensor([999, 19])
    with torch.no_grad():
        taught = student(x, t, states, timestep_cond=torch.randn(2, 64), return_dict=False)[0]
        assert torch.equal(taught, teacher(x, t, states, return_dict=False)[0])


def test_a_student_trains_and_resumes_and_an_adapter_trains_alone(
    tmp_path: Path, steps_made: list[object]
) -> None:
    teacher = make_components()
    corpus = corpus_of(teacher.autoencoder, 4, "cpu", tmp_path / "corpus.safetensors")
    published: list[int] = []

    def publish(average: UNet2DConditionModel, step: int) -> None:
        published.append(step)

    for name in ("student", "adapter"):
        student = student_of(teacher.unet) if name == "student" else copy.deepcopy(teacher.unet)
        if name == "adapter":
            add_low_rank(student, 2)
        frozen = {
            key: value.clone()
            for key, value in student.named_parameters()
            if not value.requires_grad
        }
        checkpoint = tmp_path / f"{name}.safetensors"
        steps = (1, 2) if name == "student" else (1,)
        for count in steps:
            distil(teacher, student, settings(count), corpus, checkpoint, publish)
            assert metadata_of(checkpoint)["step"] == str(count)
        assert bool(frozen) == (name == "adapter")
        for key, value in frozen.items():
            assert torch.equal(student.get_parameter(key), value)
    assert published == [1, 2, 1]
    assert len(steps_made) == 3


def test_a_stored_adapter_is_read_by_diffusers_and_makes_the_trained_network(
    tmp_path: Path,
) -> None:
    plain = make_unet().eval()
    trained = copy.deepcopy(plain)
    add_low_rank(trained, 4)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1)
    save_low_rank(trained, tmp_path / "adapter.safetensors")
    known: Any = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name="adapter.safetensors"
    )
    stored = load_file(tmp_path / "adapter.safetensors")
    assert {key.removeprefix("unet.") for key in known[0]} == {
        key.removeprefix("unet.") for key in stored
    }
    fuse(stored, plain)
    x, states, t = torch.randn(1, 4, 16, 16), torch.randn(1, 32, 128), torch.tensor([499])
    with torch.no_grad():
        ours, theirs = (unet(x, t, states, return_dict=False)[0] for unet in (plain, trained))
    assert torch.allclose(ours, theirs, atol=2e-2 * float(theirs.abs().max()))


def test_more_blocks_leave_the_decoder_as_it_was() -> None:
    components = make_components()
    deeper = deepened(components.autoencoder)
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        before = components.autoencoder.decoder(latents)
        assert torch.allclose(deeper.decoder(latents), before, atol=1e-6)


def test_the_decoder_trains_and_resumes_and_the_encoder_stays(
    tmp_path: Path, steps_made: list[object]
) -> None:
    components = make_components()
    checkpoint = tmp_path / "decoder.safetensors"

    def train(steps: int) -> Any:
        size = DecoderSettings(steps, None, batch=2, rate=1e-3, pictures=2, device="cpu", seed=0)
        return train_decoder(components, size, checkpoint)

    train(1)
    result = train(2)
    assert metadata_of(checkpoint)["step"] == "2"
    assert len(steps_made) == 2
    encoder = components.autoencoder.encoder.state_dict()
    assert all(
        torch.equal(value, encoder[name]) for name, value in result.encoder.state_dict().items()
    )


def test_the_shipped_student_draws_unseen_captions_in_few_steps() -> None:
    pipeline: Any = LatentConsistencyModelPipeline.from_pretrained(STUDENT_FOLDER)
    known = frozenset(text for texts in training_captions(100) for text in texts)
    for steps in (4, 1):
        sampling = Sampling(steps=steps, scale=2.0)
        score, _ = score_model(pipeline, unseen_scenes(1, 12, known), sampling)
        assert score.share() >= 0.9


def test_the_shipped_adapter_draws_unseen_captions_in_few_steps() -> None:
    parts = load_components(MODEL_FOLDER)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        MODEL_FOLDER, scheduler=make_few_step_scheduler()
    )
    fuse(load_file(ADAPTER_FILE), parts.unet)
    sampling, scenes = Sampling(steps=4, scale=1.0), unseen_scenes(1, 12, frozenset())
    without, _ = score_model(pipeline, scenes, sampling)
    pipeline.unet = parts.unet
    adapted, _ = score_model(pipeline, scenes, sampling)
    assert adapted.share() >= 0.9
    assert without.share() < adapted.share()
