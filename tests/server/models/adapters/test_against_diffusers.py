"""A row with adapters equals diffusers with the same files, in every format that it converts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.engine.task import ImageTask
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.unet_model import TEXT
from server.models.weight_memory import WeightMemory
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes
from tests.server.models.tiny_sdxl import BASE, make
from tests.server.models.tiny_sdxl import saved as pipeline_saved
from tests.server.toy_model import run

pytest.importorskip("peft", reason="diffusers loads adapters through peft")

# A warning of peft's about a second adapter, which is intended here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

PROMPT = "a large red circle"
SIZE = (64, 64)
SHAPE, STEPS, SEED = (4, 32, 32), 3, 5
UNET = "attentions|resnets|samplers|conv_(in|out)"
"""Layers that have the same names in kohya's scripts as in diffusers."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(BASE)


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = pipeline_saved(pipeline, tmp_path_factory.mktemp("models") / "xl")
    return load_model(folder, name="xl", device="cpu", dtype="float32")


def parts(model: HostedModel, rank: int, seed: int, unet: str = UNET) -> files.Parts:
    """Random changes of the U-Net and of both text encoders."""
    within = {"unet": unet, "text_encoder": "layers", "text_encoder_2": "layers"}
    return {
        part: changes(network, rank, seed=seed, within=within[part])
        for part, network in model.adaptable().items()
    }


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, 4, 32, 32, generator=generator), torch.tensor([500.0])


@torch.inference_mode()
def ours(model: HostedModel, adapters: Sequence[Weighted]) -> tuple[Tensor, Tensor]:
    """The encoded prompt and the U-Net's output."""
    rows = RowAdapters((tuple(adapters),))
    encoded = model.encode_prompts([PROMPT], *SIZE, rows)
    inputs = RowInputs(model.stack(encoded), adapters=rows)
    return encoded[0].tensors[TEXT], model.evaluate(*drawn(), inputs)


@torch.no_grad()
def theirs(pipeline: Any, loaded: Sequence[tuple[Path, float]]) -> tuple[Tensor, Tensor]:
    adapted = copy.deepcopy(pipeline)
    for path, _ in loaded:
        adapted.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
    adapted.set_adapters([path.stem for path, _ in loaded], [weight for _, weight in loaded])
    told, _, pooled, _ = adapted.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    sizes = torch.tensor([[*SIZE, 0.0, 0.0, *SIZE]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    x, t = drawn()
    return told[0], adapted.unet(x, t, told, added_cond_kwargs=added, return_dict=False)[0]


def loaded(model: HostedModel, path: Path, weight: float) -> Weighted:
    file = AdapterFile.read(path.stem, path, Target.of("xl", model.adaptable()))
    return Weighted(file.load(model.device, model.dtype), weight)


def assert_equal(model: HostedModel, pipeline: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    pairs = zip(
        ours(model, [loaded(model, *one) for one in adapters]),
        theirs(pipeline, adapters),
        ours(model, ()),
        strict=True,
    )
    for made, expected, plain in pairs:
        assert float((made - expected).norm() / expected.norm()) < 1e-5
        assert float((made - plain).norm() / plain.norm()) > 1e-2


@pytest.mark.parametrize(
    ("saved_as", "unet"),
    [
        (files.peft, ""),
        (files.peft_with_config, ""),
        (files.older, "attn|ff"),
        (files.kohya, UNET),
    ],
    ids=["peft", "peft-with-config", "older-diffusers", "kohya-locon"],
)
def test_a_row_with_an_adapter_is_that_of_diffusers(
    model: HostedModel, pipeline: Any, tmp_path: Path, saved_as: files.Format, unet: str
) -> None:
    made = saved_as(parts(model, 4, 1, unet))
    assert_equal(model, pipeline, [(files.saved(made, tmp_path / "style.safetensors"), 0.7)])


def test_a_dora_beside_another_adapter_is_that_of_diffusers(
    model: HostedModel, pipeline: Any, tmp_path: Path
) -> None:
    """Checked for the U-Net and both text encoders; the file holds magnitudes beside factors."""
    own = parts(model, 4, 1, "attn")
    tensors, metadata = files.peft(own)
    networks, generator = model.adaptable(), torch.Generator().manual_seed(7)
    for part, layers in own.items():
        for layer in layers:
            weight = networks[part].get_submodule(layer).get_parameter("weight").detach()
            size = weight.norm(dim=1) * (0.7 + torch.rand(len(weight), generator=generator))
            # Transformers expects another ending than diffusers.
            ending = "" if part == "unet" else ".weight"
            tensors[f"{part}.{layer}.lora_magnitude_vector{ending}"] = size
    dora = files.saved((tensors, metadata), tmp_path / "dora.safetensors")
    plain = files.saved(files.peft(parts(model, 2, 2, "attn")), tmp_path / "plain.safetensors")
    assert_equal(model, pipeline, [(plain, 0.4), (dora, 0.7)])


def test_several_adapters_of_unlike_ranks_are_composed_as_diffusers_does(
    model: HostedModel, pipeline: Any, tmp_path: Path
) -> None:
    first = files.saved(files.kohya(parts(model, 3, 1)), tmp_path / "a.safetensors")
    second = files.saved(files.peft(parts(model, 8, 2, "attn")), tmp_path / "b.safetensors")
    assert_equal(model, pipeline, [(first, 0.6), (second, 0.3)])


def test_blocks_numbered_as_in_the_original_code_of_stable_diffusion_xl_are_found(
    model: HostedModel, pipeline: Any, tmp_path: Path
) -> None:
    """The third input block is the first attention of the second down block here."""
    within = r"^down_blocks\.1\.attentions\.0\.transformer_blocks"
    tensors, metadata = files.kohya(parts(model, 4, 1, within))
    ours_to_theirs = ("down_blocks_1_attentions_0", "input_blocks_3_1")
    renamed = {name.replace(*ours_to_theirs): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    path = files.saved((renamed, metadata), tmp_path / "style.safetensors")
    assert_equal(model, pipeline, [(path, 1.0)])


def test_a_dora_by_the_names_of_the_original_code_is_the_same_by_those_of_diffusers(
    model: HostedModel, tmp_path: Path
) -> None:
    """Kohya's names, with magnitudes per input."""
    within = r"^down_blocks\.1\.attentions\.0\.transformer_blocks"
    tensors, metadata = files.kohya({"unet": parts(model, 4, 1, within)["unet"]})
    downs = [name for name in tensors if name.endswith(".lora_down.weight")]
    for name in downs:
        size = torch.linspace(0.5, 2, tensors[name].shape[1])[None]
        tensors[name.replace("lora_down.weight", "dora_scale")] = size
    ours_to_theirs = ("down_blocks_1_attentions_0", "input_blocks_3_1")
    renamed = {name.replace(*ours_to_theirs): tensor for name, tensor in tensors.items()}
    paths = [
        files.saved((named, metadata), tmp_path / f"{place}.safetensors")
        for place, named in enumerate((tensors, renamed))
    ]
    ours, theirs = (loaded(model, path, 1.0).adapter.parts["unet"] for path in paths)
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(downs)
    for layer, change in ours.items():
        own, other = change.magnitude, theirs[layer].magnitude
        assert own is not None
        assert other is not None
        assert (own.axis, own.blended) == (other.axis, other.blended) == (1, True)
        assert torch.equal(own.scale(1.0), other.scale(1.0))


@torch.inference_mode()
def latents_of(pipeline: Any, path: Path, weight: float) -> Tensor:
    """Final latents of their pipeline with an adapter, from the same x as ours."""
    adapted = copy.deepcopy(pipeline)
    adapted.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
    adapted.set_adapters([path.stem], [weight])
    adapted.scheduler.set_timesteps(STEPS)
    sigma = float(adapted.scheduler.sigmas[0])
    noise = start_noise(SEED, SHAPE)[None]
    start = noise * (1 + sigma**2) ** 0.5 / float(adapted.scheduler.init_noise_sigma)
    width, height = SIZE
    size = {"width": width, "height": height}
    given = {"num_inference_steps": STEPS, "guidance_scale": 5.0, **size}
    return adapted(PROMPT, latents=start, output_type="latent", **given).images[0]


def test_an_image_with_an_adapter_is_that_of_their_pipeline(
    model: HostedModel, pipeline: Any, engine: Engine, decoded: list[Tensor], tmp_path: Path
) -> None:
    """Guided, from the request to the final latents, beside an image without it."""
    path = files.saved(files.kohya(parts(model, 4, 1)), tmp_path / "style.safetensors")
    target, memory = Target.of("xl", model.adaptable()), WeightMemory[Adapter](2**24, "adapters")
    model.adapters = AdapterShelf((tmp_path,), target, memory, model.device, model.dtype)
    body = {
        "prompt": PROMPT,
        "steps": STEPS,
        "seed": SEED,
        "sampler": "euler",
        "spacing": {"name": "leading", "offset": 1},
        "guidance": {"name": "cfg", "scale": 5.0},
    }
    tasks: list[ImageTask] = []
    for adapters in ([{"name": "style", "weight": 0.7}], []):
        request = GenerateRequest.model_validate({**body, "adapters": adapters})
        resolved = resolve(request, model, Limits(), None)
        layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
        plan = make_plan(model.default_schedule, *layout)
        tasks += tasks_of(prepare(resolved, model, plan), model)
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    expected = latents_of(pipeline, path, 0.7)
    errors = [float((one - expected).norm() / expected.norm()) for one in decoded]
    assert min(errors) < 1e-4
    assert max(errors) > 1e-2
