"""Prompts that name embeddings are encoded as by diffusers' `load_textual_inversion`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.prompt_cache import PromptCache
from server.errors import InvalidRequest
from server.models.conditioning import Conditioning
from server.models.embeddings.embedding import Embedding
from server.models.embeddings.shelf import EmbeddingShelf
from server.models.emphasis import MAX_CHUNKS, EmphasizedPrompt
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.text_options import TextOptions
from server.models.unet_model import TEXT
from server.models.weight_memory import WeightMemory
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.models import tiny_sd, tiny_sdxl
from tests.server.models.tiny_sdxl import BASE, saved
from tests.server.toy_model import run

VECTORS = {"inkish": 1, "oilish": 3}
PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
SIZE = 64, 64
PLAIN = "a large red circle"
PROMPTS = ("inkish", "a red circle, inkish", "oilish star", "a star inkish and oilish, inkish")


@dataclass(frozen=True)
class Family:
    """One of diffusers' pipelines with the embeddings loaded, and our model of the same weights."""

    pipeline: Any
    model: HostedModel
    folder: Path

    def options(self, *names: str) -> TextOptions:
        loaded = tuple(self.model.embeddings.load(name) for name in names or VECTORS)
        return TextOptions(embeddings=loaded)

    @torch.inference_mode()
    def ours(self, *prompts: str | None, options: TextOptions | None = None) -> list[Conditioning]:
        chosen = self.options() if options is None else options
        return self.model.encode_prompts(prompts, *SIZE, None, chosen)

    @torch.inference_mode()
    def theirs(self, prompt: str) -> tuple[Tensor, ...]:
        """Hidden states of a text, and the U-Net's other inputs from it."""
        more = {} if len(self.parts) == 2 else {"device": "cpu", "num_images_per_prompt": 1}
        encoded = self.pipeline.encode_prompt(prompt, **more, do_classifier_free_guidance=False)
        return tuple(one[0] for one in encoded if one is not None)

    @property
    def parts(self) -> list[str]:
        return [part for part in PARTS if part in self.model.modules()]


@pytest.fixture(scope="module", params=["sd", "xl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    pipeline = (tiny_sd if request.param == "sd" else tiny_sdxl).make(BASE)
    # States of trained encoders have a mean; those of a fresh layer norm do not.
    pipeline.text_encoder.final_layer_norm.bias.data.fill_(0.3)
    folder, place = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("embeddings")
    model = load_model(saved(pipeline, folder), name="m", device="cpu", dtype="float32")
    target = model.embedding_target()
    memory = WeightMemory[Embedding](2**20, "embeddings")
    model.embeddings = EmbeddingShelf((place,), target, memory, model.device, model.dtype)
    made = Family(pipeline, model, place)
    generator = torch.Generator().manual_seed(3)
    for name, count in VECTORS.items():
        tensors = {
            PARTS[part] if len(target.widths) == 2 else "emb_params": 4
            * torch.randn(count, width, generator=generator)
            for part, width in target.widths.items()
        }
        save_file(tensors, place / f"{name}.safetensors")
        for part, own in zip(target.widths, tensors.values(), strict=True):
            suffix = part.removeprefix("text_encoder")
            pipeline.load_textual_inversion(
                {name: own},
                token=name,
                text_encoder=getattr(pipeline, part),
                tokenizer=getattr(pipeline, f"tokenizer{suffix}"),
            )
    return made


@pytest.fixture(scope="module")
def model(family: Family) -> HostedModel:
    return family.model


def test_prompts_are_encoded_as_by_diffusers(family: Family) -> None:
    for prompt, ours in zip(PROMPTS, family.ours(*PROMPTS), strict=True):
        states, *pooled = family.theirs(prompt)
        torch.testing.assert_close(ours.tensors[TEXT], states, rtol=1e-5, atol=1e-5)
        if pooled:
            torch.testing.assert_close(ours.tensors["text_embeds"], pooled[0])
    assert family.model.count_tokens(PROMPTS[-1]) == sum(
        family.model.count_tokens(word) for word in ("a star and, ", *VECTORS, "inkish")
    )


def test_other_prompts_keep_their_bits_and_the_encoder_its_words(family: Family) -> None:
    plain = family.ours(PLAIN, PLAIN, None, options=TextOptions())
    mixed = family.ours(PLAIN, PROMPTS[0], None)
    after = family.ours(PLAIN, PLAIN, None, options=TextOptions())
    for place in (0, 2):
        for name, tensor in plain[place].tensors.items():
            assert torch.equal(mixed[place].tensors[name], tensor)
            assert torch.equal(after[place].tensors[name], tensor)
    word = family.ours("inkish", "inkish", options=family.options("oilish"))[0]
    assert not torch.allclose(word.tensors[TEXT], mixed[1].tensors[TEXT])


def test_an_embedding_is_weighted_and_does_not_leave_its_chunk(family: Family) -> None:
    plain, weighted = (
        one.tensors[TEXT] for one in family.ours("oilish", EmphasizedPrompt("oilish"))
    )
    torch.testing.assert_close(weighted, plain)
    [strong] = family.ours(EmphasizedPrompt("(OILISH:1.5)"))
    expected = plain.clone()
    # The states of each encoder keep their own mean.
    for part in expected.split([*family.model.embedding_target().widths.values()], 1):
        mean = part.mean()
        part[1:4] *= 1.5
        part *= mean / part.mean()
    torch.testing.assert_close(strong.tensors[TEXT], expected, rtol=1e-4, atol=1e-4)
    room = family.model.facts.max_tokens
    full = "red " * (room - 2)
    [long] = family.ours(EmphasizedPrompt(f"{full} oilish"))
    first, second = family.ours(EmphasizedPrompt(full), "oilish")
    parts = torch.cat([first.tensors[TEXT], second.tensors[TEXT]])
    torch.testing.assert_close(long.tensors[TEXT], parts, rtol=1e-5, atol=1e-5)


def test_kept_prompts_are_told_apart_by_the_embeddings_that_they_name(family: Family) -> None:
    cache = PromptCache(family.model, fixed=False)
    both, one = family.options(), family.options("oilish")
    first = cache.of([PLAIN, "inkish"], *SIZE, (), both)
    second = cache.of([PLAIN, "inkish"], *SIZE, (), one)
    assert second[PLAIN] is first[PLAIN]
    assert second["inkish"] is not first["inkish"]
    assert cache.of(["inkish"], *SIZE, (), both)["inkish"] is first["inkish"]


def asked(model: HostedModel, **fields: Any) -> Any:
    body = {"prompt": PLAIN, "width": 32, "height": 32, "steps": 1, "seed": 5, "sampler": "euler"}
    resolved = resolve(GenerateRequest.model_validate(body | fields), model, Limits(), None)
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    return prepare(resolved, model, make_plan(schedule, *layout))


def test_requests_that_name_embeddings_run_beside_others(
    family: Family, engine: Engine, decoded: list[Tensor]
) -> None:
    model = family.model
    guided = {"guidance": {"name": "cfg", "scale": 4.0}}
    fields = [{}, {"prompt": "oilish star"}, {"negative_prompt": "inkish"}]
    tasks = [tasks_of(asked(model, **guided, **one), model)[0] for one in fields]
    names = [[one.name for one in task.text.embeddings] for task in tasks]
    assert names == [[], ["oilish"], ["inkish"]]
    assert not run(engine, tasks).errors
    together = list(decoded)
    for task in tasks[1:]:
        decoded.clear()
        run(engine, [task])
        [alone] = decoded
        assert min(float((alone - one).norm() / alone.norm()) for one in together) < 1e-4
    assert not torch.allclose(together[0], together[1])


def test_vectors_count_towards_the_length_of_a_prompt(family: Family) -> None:
    room = family.model.facts.max_tokens
    long = "oilish, " * (room // 4 + 1)
    with pytest.raises(InvalidRequest, match=rf"^prompt has .* tokens; .* at most {room}\."):
        asked(family.model, prompt=long)
    asked(family.model, prompt=long, prompt_syntax="automatic1111")
    with pytest.raises(InvalidRequest, match=rf"at most {MAX_CHUNKS * room}\."):
        asked(family.model, prompt=long * MAX_CHUNKS, prompt_syntax="automatic1111")


def test_a_name_that_does_not_fit_is_plain_text_and_the_answer_says_so(family: Family) -> None:
    save_file({"emb_params": torch.ones(1, 3)}, family.folder / "narrow.safetensors")
    prepared = asked(family.model, prompt="a narrow ring")
    [warning] = prepared.warnings
    assert warning.startswith("'narrow' is read as plain text: embedding 'narrow' has ")
    assert tasks_of(prepared, family.model)[0].text.embeddings == ()
