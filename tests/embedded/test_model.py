"""The shipped folder is an ordinary diffusers model, whatever the quality of its weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from embedded import MODEL_FOLDER
from embedded.components import MAX_TOKENS, make_components, make_tokenizer, save_model
from embedded.report import load_pipeline, score_autoencoder
from embedded.scenes import VOCABULARY, make_scene, render
from tests.covering import EVERY_CELL


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline(MODEL_FOLDER, "cpu")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer")


def test_the_folder_can_be_named_without_loading_torch() -> None:
    code = "import sys, embedded; print(embedded.MODEL_FOLDER, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(MODEL_FOLDER), "False"]


def test_all_files_together_are_under_40_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL_FOLDER.rglob("*")) < 40e6


def test_weights_are_safetensors() -> None:
    suffixes = {file.suffix for file in MODEL_FOLDER.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors", ".txt"}


def test_diffusers_draws_with_it_unchanged(pipeline: StableDiffusionPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    answer: Any = pipeline(
        ["a red circle", "a blue star"],
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    )
    pictures = answer.images
    assert pictures.shape == (2, 128, 128, 3)
    assert np.isfinite(pictures).all()


def test_the_schedule_is_v_prediction_on_linear_betas(pipeline: StableDiffusionPipeline) -> None:
    config = pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.timestep_spacing == "trailing"
    assert float(pipeline.scheduler.alphas_cumprod[-1]) < 1e-4
    assert float(pipeline.scheduler.final_alpha_cumprod) == 1


def test_each_known_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert [tokenizer.tokenize(word) for word in VOCABULARY] == [[word] for word in VOCABULARY]


def test_captions_survive_the_tokenizer(tokenizer: CLIPTokenizer) -> None:
    for seed in range(200):
        caption = make_scene(seed).caption
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)
        assert tokens[0] == tokenizer.bos_token
        assert tokens[-1] == tokenizer.eos_token
        assert " ".join(tokens[1:-1]).replace(" ,", ",") == caption
        assert len(tokens) <= MAX_TOKENS


def test_unknown_words_become_unknown_tokens(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer.tokenize("a reddish Star, dögs 7 on it")
    assert tokens[0] == "a"
    assert {token for token in tokens if token not in VOCABULARY} == {str(tokenizer.unk_token)}
    assert [token for token in tokens if token in VOCABULARY] == ["a", "star", ",", "on"]


def test_case_and_spaces_do_not_matter(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("  A RED\n circle ").input_ids == tokenizer("a red circle").input_ids


def test_the_stored_tokenizer_is_the_one_that_training_uses(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_the_encoder_and_decoder_keep_what_the_checker_reads(
    pipeline: StableDiffusionPipeline,
) -> None:
    scenes = [make_scene(4_100_000_000 + number) for number in range(100 if EVERY_CELL else 20)]
    assert score_autoencoder(pipeline.vae, scenes, "cpu").share() >= 0.99


def test_latents_are_white(pipeline: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        latents = pipeline.vae.encode(
            render([make_scene(4_200_000_000 + number) for number in range(50)])
        ).latents
    cells = latents.movedim(1, 0).flatten(1)
    assert torch.allclose(cells.mean(1), torch.zeros(len(cells)), atol=0.15)
    assert torch.allclose(torch.cov(cells), torch.eye(len(cells)), atol=0.2)


def test_saving_replaces_a_model_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(make_components(), folder)
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    save_model(make_components(), folder)
    after = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert before != after
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert load_pipeline(folder, "cpu").vae_scale_factor == 8
