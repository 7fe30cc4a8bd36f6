"""Images with ControlNets are those of diffusers' own pipelines with the same weights."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import Tensor

from server.engine import stages
from server.engine.client import ANONYMOUS
from server.engine.cost_model import TickCost
from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.engine.tick.stage import run_stage
from server.errors import InvalidRequest, RowFailed
from server.models.controls.control import ControlUse
from server.models.controls.row_controls import RowControl, RowControls
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.unet_model import TEXT
from server.requests.controls import ControlSettings, unloaded_controls
from tests.server.models import tiny_sd, tiny_sdxl
from tests.server.models.alike import (
    as_diffusers,
    assert_among,
    assert_apart,
    task_of,
    their_start,
)
from tests.server.models.controls.tiny_controls import of_unet, saved, shelf_of, use
from tests.server.models.tiny_sdxl import BASE
from tests.server.toy_model import run, started

PROMPT = "a large red circle"
SIZE = WIDTH, HEIGHT = 32, 24
STEPS = 4
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
NAMES = ("depth", "edges")
COSTS = {1: 0.01, 8: 0.04}


class Steered:
    """A pipeline without ControlNets, its model here, and ControlNets for both."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        pipeline.save_pretrained(folder / "model")
        self.pipeline = pipeline
        self.networks = {
            name: saved(of_unet(pipeline.unet, seed), folder / "controls", name)
            for seed, name in enumerate(NAMES)
        }
        self.model = load_model(folder / "model", name="tiny", device="cpu", dtype="float32")
        self.model.controls = shelf_of(self.model, folder / "controls")

    @torch.inference_mode()
    def theirs(self, *uses: ControlUse, seed: int = 5, **fields: Any) -> Tensor:
        """Final latents of their pipeline, from the same x as ours."""
        networks = [self.networks[one.control.name] for one in uses]
        xl = "text_encoder_2" in self.pipeline.components
        kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
        own: dict[str, Any] = (
            {"add_watermarker": False} if xl else {"requires_safety_checker": False}
        )
        pipeline: Any = kind(
            **self.pipeline.components,
            controlnet=networks[0] if len(networks) == 1 else MultiControlNetModel(networks),
            **own,
        )
        pipeline.set_progress_bar_config(disable=True)
        latents = their_start(pipeline, STEPS, SHAPE, seed)
        pictures = [one.picture[None] / 2 + 0.5 for one in uses]
        one = len(uses) == 1
        return pipeline(
            PROMPT,
            image=pictures[0] if one else pictures,
            controlnet_conditioning_scale=uses[0].scale if one else [u.scale for u in uses],
            control_guidance_start=[u.start for u in uses],
            control_guidance_end=[u.end for u in uses],
            num_inference_steps=STEPS,
            latents=latents,
            output_type="latent",
            **{"guidance_scale": 5.0, **fields},
        ).images[0]


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Steered:
    return Steered(tiny_sd.make(BASE), tmp_path_factory.mktemp("steered"))


@pytest.fixture(scope="module")
def model(steered: Steered) -> HostedModel:
    return steered.model


def asked(model: HostedModel, *uses: ControlUse, **fields: Any) -> ImageTask:
    body = as_diffusers(PROMPT, WIDTH, HEIGHT, STEPS) | fields
    return replace(task_of(model, **body), controls=uses)


def test_an_image_alone_is_that_of_diffusers(
    steered: Steered, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    depth = use(model, "depth", 1, SIZE)
    ear = run(engine, [asked(model, depth)])
    assert not ear.errors, ear.errors
    assert_among(decoded, steered.theirs(depth))
    assert_apart(decoded[0], steered.theirs(use(model, "depth", 2, SIZE)))


def test_images_in_mixed_company_are_those_of_diffusers(
    steered: Steered, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """Beside other controls, none, several, other strengths and windows; one and two branches."""
    depth = use(model, "depth", 1, SIZE)
    weak = use(model, "depth", 2, SIZE, scale=0.4)
    early, late = use(model, "edges", 3, SIZE, end=0.5), use(model, "edges", 4, SIZE, start=0.3)
    tasks = [
        asked(model, depth),
        asked(model, seed=6),
        asked(model, weak, seed=7, guidance="none"),
        asked(model, early, seed=8, negative_prompt="a green star"),
        asked(model, late, seed=9),
        asked(model, depth, early, replace(weak, start=0.25), seed=10),
        asked(model, late, seed=11, sampler="heun", guidance="apg", steps=3),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    assert_among(decoded, steered.theirs(depth))
    assert_among(decoded, steered.theirs(replace(depth, scale=0.0), seed=6))
    assert_among(decoded, steered.theirs(weak, seed=7, guidance_scale=1.0))
    assert_among(decoded, steered.theirs(early, seed=8, negative_prompt="a green star"))
    assert_among(decoded, steered.theirs(late, seed=9))
    assert_among(decoded, steered.theirs(depth, early, replace(weak, start=0.25), seed=10))
    assert_apart(steered.theirs(early, seed=8), steered.theirs(replace(early, end=1.0), seed=8))


def test_a_controlnet_gives_way_by_the_factors_of_the_extension(
    steered: Steered,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Diffusers' guess mode does so with other factors, for the prompt's prediction alone."""
    depth, edges = use(model, "depth", 1, SIZE), use(model, "edges", 2, SIZE)
    led, leading = replace(depth, precedence="prompt"), replace(depth, precedence="control")
    tasks = [
        asked(model, led),
        asked(model, leading, seed=6, negative_prompt="a green star"),
        asked(model, depth, seed=7),
        asked(model, leading, replace(edges, precedence="prompt"), seed=8, guidance="none"),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    # Rows that do not give way are unchanged by those that do.
    assert_among(decoded, steered.theirs(depth, seed=7))

    def factors(_: float, __: float, count: int, **___: Any) -> Tensor:
        return torch.tensor([0.825 ** (12 - i) for i in range(count)])

    def theirs(*uses: ControlUse, **fields: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "logspace", factors)
            return steered.theirs(*uses, **fields)

    negative = {"seed": 6, "negative_prompt": "a green star", "guess_mode": True}
    assert_among(decoded, theirs(leading, **negative))
    assert_among(decoded, theirs(leading, edges, seed=8, guidance_scale=1.0, guess_mode=True))
    # For both branches diffusers' pipelines have no such mode, but its ControlNets do.
    network = steered.networks["depth"]
    forward = network.forward

    def giving_way(*given: Any, **named: Any) -> Any:
        return forward(*given, **named | {"guess_mode": True})

    monkeypatch.setattr(network, "forward", giving_way)
    assert_among(decoded, theirs(led))


def test_images_of_stable_diffusion_xl_are_those_of_diffusers(tmp_path: Path) -> None:
    steered = Steered(tiny_sdxl.make(BASE), tmp_path)
    seen: list[Tensor] = []
    decode = steered.model.decode
    steered.model.decode = lambda latents: seen.extend(latents.clone()) or decode(latents)
    depth = use(steered.model, "depth", 1, SIZE)
    engine = started(steered.model, 16, guessed_costs=COSTS)
    ear = run(engine, [asked(steered.model, depth), asked(steered.model, seed=6)])
    engine.stop(0)
    assert not ear.errors, ear.errors
    assert_among(seen, steered.theirs(depth))
    assert_among(seen, steered.theirs(replace(depth, scale=0.0), seed=6))


@torch.inference_mode()
def test_rows_without_are_not_moved_by_a_bit(model: HostedModel) -> None:
    x, t = torch.randn(3, *SHAPE), torch.tensor([900.0, 500.0, 100.0])
    plain = model.inputs([PROMPT, "", "a star"], WIDTH, HEIGHT)
    depth = use(model, "depth", 1, SIZE)
    assert model.control_kind is not None
    hint = model.control_kind.hint(depth.control.network, depth.picture)
    rows = RowControls(((), (RowControl(depth.control, hint, 1.0),), ()), (0, 1, 2))
    without, with_one = (
        model.evaluate(x, t, inputs) for inputs in (plain, replace(plain, controls=rows))
    )
    assert torch.equal(without[[0, 2]], with_one[[0, 2]])
    assert_apart(without[1], with_one[1])


def test_what_controls_take_of_a_tick_is_no_cost_of_other_ticks(
    model: HostedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    observed: list[float] = []

    def recorded(*given: Any) -> Any:
        outcome = run_stage(*given)
        taken.append(outcome.seconds)
        return outcome

    monkeypatch.setattr(stages, "run_stage", recorded)
    monkeypatch.setattr(TickCost, "observe", lambda _, __, seconds: observed.append(seconds))
    depth, early = use(model, "depth", 1, SIZE), use(model, "edges", 2, SIZE, end=0.5)
    run(engine, [asked(model, depth, early, guidance="none")])
    one = depth.control.cost
    assert 0.3 < one < 0.7
    expected = [1 + 2 * one, 1 + 2 * one, 1 + one, 1 + one]
    assert [a / b for a, b in zip(taken, observed, strict=True)] == pytest.approx(expected)


def test_room_is_taken_for_what_controls_cost_before_they_are_loaded(
    model: HostedModel, engine: Engine
) -> None:
    """A burst of requests with them would otherwise exceed what may wait."""
    chosen = [
        ControlSettings(name="depth"),
        ControlSettings(name="edges", end=0.5),
        ControlSettings(name="edges", scale=0),
    ]
    picture = torch.empty(3, HEIGHT, WIDTH, device="meta")
    seconds: list[float] = []
    for uses in ((), unloaded_controls(chosen, picture, model)):
        with engine.reserve(1) as room:
            room.claim([asked(model, *uses, guidance="none")])
            seconds.append(engine.waiting()[ANONYMOUS].seconds)
    one = use(model, "depth", 1, SIZE).control.cost
    assert seconds[1] / seconds[0] == pytest.approx(1 + one + one / 2)


def test_what_did_not_fit_with_controls_is_refused_with_them_alone(
    model: HostedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = model.evaluate

    def short(x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if inputs.controls is not None:
            raise torch.OutOfMemoryError("no room")
        return evaluate(x, t, inputs)

    monkeypatch.setattr(model, "evaluate", short)
    steered = asked(model, use(model, "depth", 1, SIZE))
    assert isinstance(run(engine, [steered]).errors[0], RowFailed)
    assert not run(engine, [asked(model)]).errors
    with pytest.raises(InvalidRequest, match="did not fit"):
        run(engine, [steered])
    engine._overflows.forget()


@pytest.mark.parametrize("prepares", [False, True])
def test_an_image_is_bit_identical_alone_and_in_company_where_the_server_is_deterministic(
    model: HostedModel, decoded: list[Tensor], *, prepares: bool
) -> None:
    depth, edges = use(model, "depth", 1, SIZE), use(model, "edges", 2, SIZE, scale=0.5)
    engine = started(model, 8, deterministic=True, guessed_costs=COSTS, prepares=prepares)
    decoded.clear()
    company = [asked(model, seed=6), asked(model, edges, seed=7), asked(model, depth, edges, depth)]
    rows: set[int] = set()

    def noted(_: Any, given: tuple[Tensor, ...]) -> None:
        rows.add(len(given[0]))

    handles = [one.control.network.register_forward_pre_hook(noted) for one in (depth, edges)]
    for tasks in (company[2:], company):
        ear = run(engine, tasks)
        assert not ear.errors, ear.errors
    engine.stop(0)
    for handle in handles:
        handle.remove()
    alone, *together = decoded
    assert any(torch.equal(alone, one) for one in together)
    # These may be equal by chance: libraries choose the order of sums by the number of rows.
    assert rows == {8}


def test_a_controlnet_is_let_go_of_with_the_last_image_that_has_it(
    steered: Steered, model: HostedModel, engine: Engine
) -> None:
    passing = use(model, "edges", 1, SIZE)
    gone = weakref.ref(passing.control)
    run(engine, [asked(model, passing)])
    run(engine, [asked(model)])
    del passing
    model.controls.forget()
    gc.collect()
    assert gone() is None


@torch.inference_mode()
def test_beside_a_mask_a_controlnet_reads_the_latents_alone(tmp_path: Path) -> None:
    """``StableDiffusionControlNetInpaintPipeline`` calls both networks like this."""
    pipeline = tiny_sd.make(BASE, StableDiffusionInpaintPipeline, in_channels=9)
    pipeline.save_pretrained(tmp_path / "model")
    network = saved(of_unet(pipeline.unet, 1, in_channels=4), tmp_path / "controls", "depth")
    model = load_model(tmp_path / "model", name="tiny", device="cpu", dtype="float32")
    model.controls = shelf_of(model, tmp_path / "controls")
    depth = use(model, "depth", 1, SIZE)
    x, t, channels = torch.randn(1, *SHAPE), torch.tensor([500.0]), torch.randn(1, 5, *SHAPE[1:])
    plain = model.inputs([PROMPT], WIDTH, HEIGHT)
    assert model.control_kind is not None
    hint = model.control_kind.hint(depth.control.network, depth.picture)
    rows = RowControls(((RowControl(depth.control, hint, 0.5),),), (0,))
    ours = model.evaluate(x, t, replace(plain, channels=channels, controls=rows))
    text, pixels = plain.conditioning.tensors[TEXT], depth.picture[None] / 2 + 0.5
    skips, middle = network(x, t, text, pixels, conditioning_scale=0.5, return_dict=False)
    [theirs] = pipeline.unet(
        torch.cat([x, channels], 1),
        t,
        text,
        down_block_additional_residuals=skips,
        mid_block_additional_residual=middle,
        return_dict=False,
    )
    torch.testing.assert_close(ours, theirs)
