"""Model folders are read without trust."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from embedded import MODEL_FOLDER
from server.errors import ModelMismatch
from server.models.loading import choose_device, choose_dtype, load_model
from server.models.stable_diffusion import TEXT


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL_FOLDER, tmp_path / "model")


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def load(folder):
    return load_model(folder, name="m", device="cpu", dtype="auto")


def test_the_embedded_model_says_what_it_is():
    facts = load(MODEL_FOLDER).facts
    assert facts.prediction == "v_prediction"
    assert (facts.default_width, facts.default_height) == (128, 128)
    assert (facts.latent_scale, facts.size_multiple) == (8, 32)
    assert len(facts.revision) == 16


def test_the_revision_follows_the_weights(folder):
    before = load(folder).facts.revision
    file = next(folder.glob("unet/*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert load(folder).facts.revision != before


def test_the_revision_does_not_follow_what_derives_from_the_weights(folder):
    before = load(folder).facts.revision
    (folder / "weft").mkdir(exist_ok=True)
    save_file({"l": torch.zeros(3)}, folder / "weft" / "ems-cfg-3.safetensors")
    assert load(folder).facts.revision == before


def test_prompts_are_counted_without_markers_and_unknown_words_are_no_error():
    model = load(MODEL_FOLDER)
    assert model.count_tokens("") == 0
    assert model.count_tokens("a red circle") == 3
    encoded = model.encode_prompts(["xylophone 東京", None], 128, 128)
    assert all(one.tensors[TEXT].isfinite().all() for one in encoded)


def test_a_picture_survives_the_autoencoder():
    model = load(MODEL_FOLDER)
    with torch.inference_mode():
        latents = model.encode_image(torch.zeros(2, 3, 128, 128))
        assert latents.shape == (2, *model.latent_shape(128, 128))
        assert model.decode(latents).shape == (2, 3, 128, 128)


def refuse_pipeline(folder):
    edit(folder / "model_index.json", _class_name="CustomPipeline")


def refuse_no_index(folder):
    (folder / "model_index.json").unlink()


def refuse_broken_index(folder):
    (folder / "model_index.json").write_text("{")


def refuse_list_index(folder):
    (folder / "model_index.json").write_text("[]")


def refuse_remote_code(folder):
    edit(folder / "model_index.json", unet=["my_code", "Unet"])


def refuse_pickled_weights(folder):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def refuse_inpainting_unet(folder):
    edit(folder / "unet" / "config.json", in_channels=9)


def refuse_truncated_weights(folder):
    file = next(folder.glob("unet/*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (refuse_pipeline, "names the pipeline 'CustomPipeline'; allowed are StableDiffusion"),
        (refuse_no_index, "has no model_index.json"),
        (refuse_broken_index, "is no JSON"),
        (refuse_list_index, "holds no JSON object"),
        (refuse_remote_code, "names 'Unet' as its unet; allowed are UNet2DConditionModel"),
        (refuse_pickled_weights, "no safetensors weights; other formats are refused"),
        (refuse_inpainting_unet, "could not be loaded|9 input channels"),
        (refuse_truncated_weights, "could not be loaded"),
    ],
)
def test_a_folder_that_cannot_be_hosted_is_refused_with_the_reason(folder, spoil, says):
    spoil(folder)
    with pytest.raises(ModelMismatch, match=says):
        load(folder)


def test_devices_and_types_are_chosen_or_refused():
    cpu = choose_device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ModelMismatch, match="allowed are auto, cpu, cuda"):
        choose_device("toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ModelMismatch, match="no CUDA device"):
        choose_device("cuda")
