"""Normalized attention guidance in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from guidance import CFG, NAG, PAG, Edit
from guidance.edits import NormalizedAttention
from samplers import preconditioning
from server.engine.state.noise import start_noise
from server.engine.tick.preview import to_uint8
from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.requests.resolve import Prepared, make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits
from tests.server.attention_guidance import guided_attention, predicted
from tests.server.toy_model import Toy

NEGATIVE = "a blue star"


@pytest.fixture(scope="module")
def unet(thin_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(thin_folder / "unet").eval()


def drawn(model: Any, unet: Any, one: Any, setting: NAG, scale: float) -> Any:
    """A run by hand, with every evaluation in its own batch."""
    guided, _ = guided_attention(unet, setting.scale, setting.tau, setting.alpha)
    plan, schedule = one.plan, model.default_schedule
    prompt, negative = model.encode_prompts(
        [one.prompt, one.negative_prompt], one.width, one.height
    )
    told, against = (text.tensors["encoder_hidden_states"][None] for text in (prompt, negative))
    state = torch.zeros(plan.slots, *model.latent_shape(one.width, one.height))
    state[0] = plan.start_scale * start_noise(one.seed, state.shape[1:])
    for i in range(plan.evaluations):
        x = state[:1]
        scales = preconditioning(model.facts.prediction, plan.alpha[i], plan.sigma[i])
        t = torch.tensor([float(schedule.conditioning(plan.t[i]))])
        inside = plan.step[i] / plan.steps < setting.stop
        given = float(scales.scale_in) * x, t
        with torch.no_grad():
            raw = predicted(guided, *given, told, against) if inside else unet(*given, told).sample
            plain = unet(*given, against).sample
        cond, other = (float(scales.skip) * x + float(scales.out) * r for r in (raw, plain))
        denoised = other + scale * (cond - other)
        columns = torch.cat([state, denoised, torch.zeros_like(x), torch.ones_like(x)])
        matrix = torch.tensor(plan.tables[i], dtype=torch.float32)
        state = torch.einsum("kj,jchw->kchw", matrix, columns)
    with torch.inference_mode():
        return to_uint8(model.decode(state[:1]))[0].numpy()


@pytest.mark.parametrize(
    ("rule", "scale", "stop"), [("none", 1.0, 0.5), (CFG(scale=3.0), 3.0, 1.0)], ids=["none", "cfg"]
)
def test_a_picture_is_that_of_the_published_processor(
    model: Any, engine: Any, task: Any, run: Any, unet: Any, rule: Any, scale: float, stop: float
) -> None:
    # A bound that some tokens reach and others do not.
    setting = NAG(scale=4.0, tau=4.0, stop=stop)
    one = task("dpm_solver_pp", rule, steps=4, negative_prompt=NEGATIVE, settings=(setting,))
    company = [task(rule="cfg", negative_prompt=NEGATIVE, settings=(PAG(),), seed=8)]
    ours = run(engine, [*company, one]).pixels()[1]
    theirs = drawn(model, unet, one, setting, scale)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


def test_it_costs_no_evaluation_and_the_negative_prompt_matters(
    engine: Any, task: Any, run: Any
) -> None:
    few: dict[str, Any] = {"sampler": "lcm", "rule": "none", "steps": 2}
    nag = (NAG(),)
    tasks = [
        task(**few),
        task(**few, settings=nag, negative_prompt=NEGATIVE),
        task(**few, settings=nag, negative_prompt="a red circle"),
        task(**few, settings=nag, negative_prompt=None),
        task(**few, settings=(NAG(scale=1.0),), negative_prompt=NEGATIVE),
    ]
    hearing = run(engine, tasks)
    plain, star, circle, empty, neutral = hearing.pixels()
    assert {result.evaluations for result in hearing.results.values()} == {2}
    for one, other in ((plain, star), (star, circle), (star, empty), (plain, empty)):
        assert np.abs(one.astype(int) - other.astype(int)).max() > 5
    assert np.array_equal(plain, neutral)


def test_an_image_is_bit_identical_alone_and_in_any_mix(
    fixed_engine: Any, task: Any, run: Any
) -> None:
    one = task(settings=(NAG(stop=0.7), PAG()), negative_prompt=NEGATIVE)
    company = [
        task(settings=(NAG(scale=6.0),), negative_prompt="a yellow square", rule="none", seed=1),
        one,
        task(seed=2),
    ]
    [alone] = run(fixed_engine, [one]).pixels()
    assert np.array_equal(run(fixed_engine, company).pixels()[1], alone)


def asked_of(model: HostedModel, **fields: Any) -> Prepared:
    request = GenerateRequest.model_validate({"prompt": "x", "steps": 4, **fields})
    resolved = resolve(request, model, Limits(), None)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    return prepare(resolved, model, make_plan(model.default_schedule, *layout))


def test_a_negative_prompt_has_an_effect_without_guidance_if_this_is_asked_for() -> None:
    fields: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance": "none"}
    assert asked_of(Toy(), **fields).warnings
    nag = {"name": "none", "nag": {"scale": 5, "stop": 0.5}}
    prepared = asked_of(Toy(), **fields | {"guidance": nag})
    assert not prepared.warnings
    [task] = tasks_of(prepared, Toy())
    [term] = task.terms
    assert term.texts == (NEGATIVE,)
    assert [term.acts(stage) for stage in range(4)] == [True, True, False, False]


class Deaf(Toy):
    """A model without cross-attention."""

    def refuses(self, edit: Edit) -> str | None:
        refused = isinstance(edit, NormalizedAttention)
        return "has no cross-attention that reads the text itself" if refused else None


def test_a_model_without_cross_attention_refuses() -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked_of(Deaf(), guidance={"name": "cfg", "nag": {}})
    assert caught.value.field == "guidance.nag"
    assert caught.value.message == (
        "guidance.nag: model 'toy' has no cross-attention that reads the text itself."
    )
