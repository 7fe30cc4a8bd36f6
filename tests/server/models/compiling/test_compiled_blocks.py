"""Which blocks run compiled, when, and what happens to all others.

Here, programs are copies of the blocks to be compiled; `test_compiler.py` does compile.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from embedded import MODEL_FOLDER
from guidance.edits import IdentityAttention
from server.models.adapters.adapter import Adapter, LowRank, RowAdapters, Weighted
from server.models.compiling import compiled_blocks as module
from server.models.compiling.compiled_blocks import Compilation
from server.models.compiling.model_blocks import compilation_of, compile_blocks
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.placement import Placement
from tests.server.models import tiny_z_image
from tests.server.models.compiling.copied import Copied


@pytest.fixture(scope="module")
def unet() -> HostedModel:
    return load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = tmp_path_factory.mktemp("z")
    tiny_z_image.make(tiny_z_image.BASE_SHIFT).save_pretrained(folder)
    return load_model(folder, name="m", device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, unet: HostedModel) -> None:
    monkeypatch.setattr(module, "COMPILE_THRESHOLD", 2)
    # Blocks that may not run compiled run as before, even if they are wrapped.
    monkeypatch.setattr(unet, "blocks", None)


@torch.inference_mode()
def predicted(model: HostedModel, rows: int, **told: Any) -> Tensor:
    facts = model.facts
    shape = model.latent_shape(facts.default_width, facts.default_height)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    inputs = model.inputs(["a red circle", "a blue square and a star", None, "a star"][:rows])
    return model.evaluate(x, torch.linspace(0.9, 0.1, rows) * 900, replace(inputs, **told))


def compiled(model: HostedModel) -> Copied:
    compiler = Copied()
    compile_blocks(model, compiler)
    for _ in range(2):
        predicted(model, 3)
    return compiler


@pytest.mark.parametrize("family", ["unet", "z_image"])
def test_a_compiled_forward_gives_the_numbers_of_a_plain_one(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    expected = {rows: predicted(model, rows) for rows in (1, 3)}
    compiler = compiled(model)
    shapes = len(compiler.asked)
    # One for each shape of a block, however many blocks there are.
    assert len({identity for _, identity, _ in compiler.asked}) == shapes
    assert (compiler.ran, compilation_of(model)) == (0, Compilation(waiting=shapes))
    compiler.work()
    assert compilation_of(model) == Compilation(compiled=shapes)
    assert model.blocks is not None
    # All switched at once.
    assert model.blocks.generation == 1
    for rows, before in expected.items():
        ran = compiler.ran
        now = predicted(model, rows)
        assert compiler.ran > ran
        assert (now - before).norm() <= 1e-5 * before.norm()


def test_a_program_serves_every_number_of_rows_and_rows_that_change_something_run_as_ever(
    unet: HostedModel,
) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    low_rank = LowRank(torch.ones(1, 128), torch.ones(128, 1))
    adapter = Adapter("a", "0" * 16, {"unet": {layer: low_rank}})
    changed: list[dict[str, Any]] = [
        {"adapters": RowAdapters(((), (Weighted(adapter, 1.0),)))},
        {"edits": [(IdentityAttention(("middle",)),), ()]},
    ]
    expected = [predicted(unet, 2, **told) for told in changed]
    compiler = compiled(unet)
    shapes = len(compiler.asked)
    compiler.work()
    for rows in (1, 2, 4, 4):
        ran = compiler.ran
        predicted(unet, rows)
        # All blocks of the network: 11 residual ones and 7 that attend.
        assert compiler.ran == ran + 18
    assert len(compiler.asked) == shapes == 12
    ran = compiler.ran
    for told, before in zip(changed, expected, strict=True):
        assert torch.equal(predicted(unet, 2, **told), before)
    assert compiler.ran == ran


def test_what_cannot_be_compiled_runs_as_ever_and_says_why_once(
    unet: HostedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predicted(unet, 2)
    monkeypatch.setattr(module, "MAX_SHAPES", 3)
    compiler = compiled(unet)
    # There is a limit, as clients may request many sizes.
    assert len(compiler.asked) == 3
    compiler.refuse("there is no compiler")
    assert torch.equal(predicted(unet, 2), expected)
    assert compilation_of(unet) == Compilation(eager=3, reason="there is no compiler")
    [warning] = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert warning.endswith(" is not compiled: there is no compiler")


def test_a_program_that_fails_gives_way_to_the_block_and_takes_no_image_with_it(
    unet: HostedModel,
) -> None:
    expected = predicted(unet, 2)
    compiler = compiled(unet)
    shapes = len(compiler.asked)
    compiler.fails = RuntimeError("wrong stride")
    compiler.work()
    assert torch.equal(predicted(unet, 2), expected)
    reason = "its program failed: RuntimeError: wrong stride"
    assert compilation_of(unet) == Compilation(eager=shapes, reason=reason)
    compiler = compiled(unet)
    compiler.fails = torch.OutOfMemoryError("more")
    compiler.work()
    with pytest.raises(torch.OutOfMemoryError):
        predicted(unet, 2)
    assert compilation_of(unet) == Compilation(compiled=shapes)


def test_programs_do_not_wait_for_ever_other_shapes(
    unet: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWITCH_DELAY_S", 0)
    compiler = compiled(unet)
    del compiler.asked[-1]
    compiler.work()
    assert compilation_of(unet) == Compilation(compiled=len(compiler.asked), waiting=1)


def test_a_shape_that_is_no_longer_called_gives_its_place_to_another(
    unet: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = compiled(unet)
    shapes = len(compiler.asked)
    monkeypatch.setattr(module, "MAX_SHAPES", shapes)
    compiler.work()
    assert unet.blocks is not None
    generation = unet.blocks.generation
    clock = iter([10.0, 20.0, 700.0, 710.0])
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    monkeypatch.setattr(unet.blocks, "_called_at", dict.fromkeys(unet.blocks._called_at, 0.0))

    def of_another_size() -> None:
        x = torch.zeros(3, *unet.latent_shape(64, 64))
        with torch.inference_mode():
            unet.evaluate(x, torch.zeros(3), unet.inputs(["a star", None, "a star"]))

    of_another_size()
    of_another_size()
    assert len(compiler.asked) == shapes
    of_another_size()
    assert len(compiler.asked) == 2 * shapes
    assert compilation_of(unet) == Compilation(waiting=shapes)
    assert unet.blocks.generation > generation
    predicted(unet, 3)
    assert len(compiler.asked) == 2 * shapes


def test_calls_of_ever_other_shapes_are_not_counted_for_ever(
    unet: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COUNTED", 12)
    compile_blocks(unet, Copied())
    assert unet.blocks is not None
    for side in (64, 72, 80):
        x = torch.zeros(1, *unet.latent_shape(side, 64))
        with torch.inference_mode():
            unet.evaluate(x, torch.zeros(1), unet.inputs([None]))
    assert len(unet.blocks._calls) == 12


def test_nothing_more_is_compiled_for_a_model_that_has_been_unloaded() -> None:
    model = load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float32")
    compiler = compiled(model)
    assert compiler.wanted()
    del model
    gc.collect()
    assert not compiler.wanted()


def test_quantised_and_streamed_models_run_as_ever(
    unet: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Copied()
    assert compilation_of(unet) is None
    monkeypatch.setattr(unet, "runs_eager", None)
    for placement, reason in (
        (Placement(quantization="int8"), "its weights are quantised to int8"),
        (Placement(offload="all"), "its denoiser is streamed from host memory"),
    ):
        monkeypatch.setattr(unet, "placement", placement)
        compile_blocks(unet, compiler)
        assert (unet.blocks, compilation_of(unet)) == (None, Compilation(reason=reason))
