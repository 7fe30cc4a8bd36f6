"""Model folders are read without trusting them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from embedded import MODEL_FOLDER
from server.errors import ModelMismatch
from server.models.folder import classifier_file, revisions_of
from server.models.loading import choose_device, choose_dtype, load_model
from server.models.unet_model import TEXT
from server.models.weight_files import bytes_in_memory
from server.models.weights_held import bytes_of
from tests.server.models.tiny_sd import make
from tests.server.models.tiny_sdxl import BASE, saved


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return saved(make(BASE), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def load(folder):
    return load_model(folder, name="m", device="cpu", dtype="auto")


def test_the_embedded_model_says_what_it_is():
    facts = load(MODEL_FOLDER).facts
    assert facts.prediction == "v_prediction"
    assert (facts.default_width, facts.default_height) == (128, 128)
    assert (facts.latent_scale, facts.size_multiple) == (8, 8)
    assert len(facts.revision) == len(facts.denoiser) == 16
    revisions = revisions_of(MODEL_FOLDER)
    assert (facts.revision, facts.denoiser) == (revisions.weights, revisions.denoiser)


def test_how_much_of_the_weights_is_read_is_told():
    heard = []
    revisions_of(MODEL_FOLDER, lambda *read: heard.append(read))
    total = sum(
        file.stat().st_size
        for file in MODEL_FOLDER.rglob("*.safetensors")
        if not file.is_relative_to(MODEL_FOLDER / "weft")
    )
    assert heard[-1] == (total, total)
    assert sorted(set(heard)) == heard


def test_the_revision_follows_the_weights(folder):
    before = revisions_of(folder).weights
    file = next(folder.glob("unet/*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert revisions_of(folder).weights != before


def test_revisions_are_digests_of_paths_and_files_with_and_without_the_autoencoder(tmp_path):
    named = {"unet/a": b"1" * 5, "vae/b": b"2" * 7, "vae/c": b"3", "xyz/d": b"4" * 9}
    for name, content in named.items():
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)

    def digest(names):
        joined = b"".join(f"{name}.safetensors".encode() + named[name] for name in names)
        return hashlib.sha256(joined).hexdigest()[:16]

    assert revisions_of(tmp_path) == (digest(named), digest(["unet/a", "xyz/d"]))


def test_weights_are_digested_once_up_to_the_autoencoder(tmp_path, monkeypatch):
    for part, size in {"unet": 1000, "vae": 10}.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "w.safetensors").write_bytes(bytes(size))
    digested = []

    class Counting:
        def __init__(self, digest):
            self.digest = digest

        def update(self, data):
            digested.append(len(data))
            self.digest.update(data)

        def copy(self):
            return Counting(self.digest.copy())

        def hexdigest(self):
            return self.digest.hexdigest()

    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda: Counting(sha256()))
    revisions_of(tmp_path)
    paths = sum(len(f"{part}/w.safetensors") for part in ("unet", "vae"))
    assert sum(digested) == 1010 + paths


@pytest.mark.parametrize("changed", ["unet/*.safetensors", "vae/config.json", "model_index.json"])
def test_a_folder_that_changes_while_it_is_read_is_refused(folder, changed):
    file = next(folder.glob(changed))
    copy = shutil.copyfile(file, folder / "another copy")

    def replaced(done, total):
        if done == total:
            copy.replace(file)

    with pytest.raises(ModelMismatch, match=r"changed while it was read; try again\.$"):
        load_model(folder, name="m", device="cpu", dtype="auto", on_progress=replaced)


def test_what_is_fitted_to_latents_outlives_another_decoder(folder):
    before = revisions_of(folder)
    file = next(folder.glob("vae/*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    after = revisions_of(folder)
    assert after.weights != before.weights
    assert after.denoiser == before.denoiser


def test_the_revision_does_not_follow_what_derives_from_the_weights(folder):
    before = revisions_of(folder).weights
    (folder / "weft").mkdir()
    save_file({"l": torch.zeros(3)}, folder / "weft" / "ems-cfg-3.safetensors")
    assert revisions_of(folder).weights == before


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


def refuse_unreadable_index(folder):
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").mkdir()


def refuse_list_index(folder):
    (folder / "model_index.json").write_text("[]")


def refuse_remote_code(folder):
    edit(folder / "model_index.json", unet=["my_code", "Unet"])


def refuse_pickled_weights(folder):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def retouch(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def refuse_pickled_text_encoder(folder):
    file = weights(folder, "text_encoder")
    pickled = folder / "text_encoder" / "pytorch_model.bin"
    torch.save(load_file(file), pickled)  # noqa: TID251 - the pickle is what is refused
    file.unlink()


def refuse_depth_unet(folder):
    def widen(tensors):
        tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 2, 1, 1)[:, :5].clone()

    edit(folder / "unet" / "config.json", in_channels=5)
    retouch(weights(folder, "unet"), widen)


def refuse_truncated_weights(folder):
    file = next(folder.glob("unet/*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


def refuse_list_as_pipeline(folder):
    edit(folder / "model_index.json", _class_name=["StableDiffusionPipeline"])


def refuse_list_as_class(folder):
    edit(folder / "model_index.json", vae=["diffusers", ["AutoencoderTiny"]])


def refuse_deep_index(folder):
    (folder / "model_index.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def refuse_deep_config(folder):
    (folder / "unet" / "config.json").write_text("[" * 100_000 + "]" * 100_000)


def refuse_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="noise")


def refuse_flow(folder):
    """Configure a fine-tune of Stable Diffusion XL that was trained as a flow."""
    name = "FlowMatchEulerDiscreteScheduler"
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name, shift=3.0)


def refuse_edm(folder):
    """Configure the scheduler as Playground v2.5 does."""
    name = "EDMDPMSolverMultistepScheduler"
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name, sigma_data=0.5)


def refuse_trained_steps(folder):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)


def refuse_missing_tensors(folder):
    retouch(weights(folder, "unet"), lambda tensors: tensors.pop("conv_out.bias"))


def refuse_missing_text_tensors(folder):
    name = "encoder.layers.0.mlp.fc1.weight"
    retouch(weights(folder, "text_encoder"), lambda tensors: tensors.pop(name))


def refuse_missing_autoencoder_tensors(folder):
    retouch(weights(folder, "vae"), lambda tensors: [tensors.pop(k) for k in list(tensors)[:5]])


def refuse_leftover_tensors(folder):
    retouch(weights(folder, "unet"), lambda tensors: tensors.update(more=torch.zeros(2)))


def refuse_mismatched_tensors(folder):
    retouch(weights(folder, "unet"), lambda t: t.update({"conv_out.bias": torch.zeros(5)}))


def refuse_mismatched_text_tensors(folder):
    name = "encoder.layers.0.mlp.fc1.bias"
    retouch(weights(folder, "text_encoder"), lambda t: t.update({name: torch.zeros(5)}))


def refuse_length(folder):
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length="long")


def refuse_shards_elsewhere(folder):
    name = "diffusion_pytorch_model.safetensors.index.json"
    outside = {"weight_map": {"conv_out.bias": "../vae/diffusion_pytorch_model.safetensors"}}
    (folder / "unet" / name).write_text(json.dumps(outside))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (refuse_pipeline, "names the pipeline 'CustomPipeline'; allowed are .*StableDiffusion"),
        (refuse_no_index, "has no model_index.json"),
        (refuse_broken_index, "is not valid JSON"),
        (refuse_unreadable_index, "model_index.json .* cannot be read: Is a directory"),
        (refuse_list_index, "does not contain a JSON object"),
        (refuse_remote_code, "names 'Unet' as its unet; allowed are UNet2DConditionModel"),
        (refuse_pickled_weights, "no safetensors weights; other formats are refused"),
        (refuse_pickled_text_encoder, "no file named model.safetensors"),
        (refuse_depth_unet, "has a U-Net of 5 input channels; allowed are 4, .* and 9"),
        (refuse_truncated_weights, "could not be loaded"),
        (refuse_list_as_pipeline, r"names the pipeline .*; allowed are .*StableDiffusionPipeline"),
        (refuse_list_as_class, r"names .* as its vae; allowed are AutoencoderKL, AutoencoderTiny"),
        (refuse_deep_index, "model_index.json of model folder .* is nested too deeply"),
        (refuse_deep_config, "unet/config.json of model folder .* is nested too deeply"),
        (refuse_prediction, "has the prediction_type 'noise'; allowed are epsilon, v_prediction"),
        (
            refuse_flow,
            "names the FlowMatchEulerDiscreteScheduler; of this family only models with betas",
        ),
        (
            refuse_edm,
            "names the EDMDPMSolverMultistepScheduler; of this family only models with betas",
        ),
        (
            refuse_trained_steps,
            "num_train_timesteps is 1000000000000; it must be a whole number from 2 to 100000",
        ),
        (refuse_missing_tensors, "unet of model folder .* lacks the tensor conv_out.bias"),
        (refuse_missing_text_tensors, r"text_encoder of .* lacks the tensor .*mlp\.fc1\.weight"),
        (refuse_missing_autoencoder_tensors, r"vae of .* lacks the tensors .* and 2 more"),
        (refuse_leftover_tensors, "has, beyond what its config describes, the tensor more"),
        (refuse_mismatched_tensors, "in another shape .* the tensor conv_out.bias"),
        (refuse_mismatched_text_tensors, r"in another shape .* the tensor .*mlp\.fc1\.bias"),
        (refuse_length, "has the model_max_length 'long'; a whole number of at least 3"),
        (refuse_shards_elsewhere, r"has no unet/\.\./vae/diffusion_pytorch_model"),
    ],
)
def test_a_folder_that_cannot_be_hosted_is_refused_with_the_reason(folder, spoil, says):
    spoil(folder)
    with pytest.raises(ModelMismatch, match=says) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_a_length_takes_what_the_text_encoder_takes(folder):
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    model = load(folder)
    assert model.facts.max_tokens == 30
    [encoded] = model.encode_prompts(["a red circle"], 128, 128)
    assert encoded.length == 32


def test_entries_of_configs_that_load_code_are_never_followed(folder, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a kernel of the hub is asked for")

    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.load_and_register_attn_kernel", forbidden
    )
    code = {
        "_attn_implementation": "some/repo",
        "attn_implementation": "some/repo",
        "auto_map": {"AutoModel": "evil.Model"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    edit(folder / "text_encoder" / "config.json", **code)
    edit(folder / "unet" / "config.json", **code)
    model = load(folder)
    modules: Any = model.modules()
    text = modules["text_encoder"]
    assert text.config._attn_implementation == "sdpa"
    assert not hasattr(text, "hf_quantizer")
    assert "quantization_config" not in modules["unet"].config


def test_a_folder_may_have_ddim_land_on_a_trained_step(folder):
    assert load(folder).default_schedule.clean_end
    edit(folder / "scheduler" / "scheduler_config.json", set_alpha_to_one=False)
    assert not load(folder).default_schedule.clean_end


def test_sharded_weights_are_those_of_one_file(folder):
    whole = load_file(weights(folder, "unet"))
    expected = load(folder).modules()["unet"].state_dict()
    weights(folder, "unet").unlink()
    halves = [dict(list(whole.items())[k::2]) for k in range(2)]
    shards = {f"part-{k}.safetensors": half for k, half in enumerate(halves)}
    for name, half in shards.items():
        save_file(half, folder / "unet" / name)
    index = {key: name for name, half in shards.items() for key in half}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / "unet" / name).write_text(json.dumps({"weight_map": index}))
    found = load(folder).modules()["unet"].state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


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


def test_what_is_said_of_a_spoilt_classifier_names_no_folder(folder):
    classifier_file(folder).parent.mkdir()
    classifier_file(folder).write_bytes(b"\x08")
    lacks = load(folder).classifier_lacks
    assert "'classifier.safetensors' cannot be read" in lacks
    assert str(folder) not in lacks


def test_torchs_default_type_stays_what_it_is_while_a_model_is_loaded(monkeypatch):
    """It applies to all threads: noise that the engine draws meanwhile would be rounded to it."""
    chosen, choose = [], torch.set_default_dtype

    def watched(dtype):
        chosen.append(dtype)
        choose(dtype)

    with monkeypatch.context() as watching:
        watching.setattr(torch, "set_default_dtype", watched)
        model = load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float16")
    assert set(chosen) <= {torch.float32}
    plain = CLIPTextModel.from_pretrained(MODEL_FOLDER / "text_encoder", dtype=torch.float16)
    theirs, ours = plain.state_dict(), model.modules()["text_encoder"].state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert all(theirs[name].dtype == ours[name].dtype for name in theirs)


def test_a_family_that_may_overflow_in_float16_says_so(folder, caplog):
    edit(folder / "model_index.json", _class_name="ZImagePipeline")
    for dtype, warned in (("bfloat16", False), ("float16", True)):
        caplog.clear()
        with pytest.raises(ModelMismatch):
            load_model(folder, name="m", device="cpu", dtype=dtype)
        assert ("a ZImagePipeline may overflow in float16" in caplog.text) == warned


def test_weights_of_a_variant_serve_where_there_are_no_others(folder):
    plain, taken = load(folder), bytes_in_memory(folder, torch.float32)
    for file in folder.glob("*/*.safetensors"):
        variant = "bf16" if file.parent.name == "unet" else "fp16"
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    for part, network in load(folder).modules().items():
        weights = plain.modules()[part].state_dict()
        assert all(torch.equal(tensor, weights[k]) for k, tensor in network.state_dict().items())
    assert bytes_in_memory(folder, torch.float32) == taken


def test_what_a_model_takes_is_said_by_its_headers(folder):
    """This includes a companion."""
    whole, half = (bytes_in_memory(MODEL_FOLDER, dtype) for dtype in (torch.float32, torch.float16))
    assert whole == pytest.approx(bytes_of(load(MODEL_FOLDER)), rel=0.01)
    assert half < 0.6 * whole
    next(folder.glob("unet/*.safetensors")).write_bytes(b"\xff" * 20)
    with pytest.raises(ModelMismatch, match=r"unet/.* is not a safetensors file"):
        bytes_in_memory(folder, torch.float32)


def test_a_file_that_was_copied_in_part_is_named_before_any_is_loaded(folder):
    file = next(folder.glob("unet/*.safetensors"))
    whole = file.stat().st_size
    os.truncate(file, whole - 1)
    cut = rf"unet/{file.name} of model folder .* is cut short: it has {whole - 1} of {whole} bytes"
    with pytest.raises(ModelMismatch, match=cut):
        bytes_in_memory(folder, torch.float32)
