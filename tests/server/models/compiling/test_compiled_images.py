"""Images with compiled blocks equal those without, whatever else their rows are given.

Here, programs are copies of the blocks to be compiled; `test_compiler.py` does compile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, QwenImageEditPlusPipeline

from server.models import transformer_model
from server.models.compiling import compiled_blocks as module
from server.models.compiling.compiled_blocks import Compilation
from server.models.compiling.model_blocks import DENOISERS, compilation_of, compile_blocks
from server.models.loading import load_model
from server.models.references import SeenPicture
from server.service.pixels import pixels_tensor
from tests.server.models import tiny_flux1, tiny_flux2, tiny_qwen_image, tiny_sd
from tests.server.models.alike import task_of
from tests.server.models.compiling.copied import Copied
from tests.server.models.controls import tiny_controls
from tests.server.models.image_prompts import tiny_image_prompts
from tests.server.models.tiny_sdxl import BASE, saved
from tests.server.toy_model import run, started

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel

    ForwardInputs = tuple[HostedModel, list[ImageTask]]

WIDTH, HEIGHT = 32, 24


def asked(model: HostedModel, seed: int, **fields: Any) -> ImageTask:
    usual: dict[str, Any] = {"prompt": "a star", "steps": 3, "width": WIDTH, "height": HEIGHT}
    body: dict[str, Any] = {**usual, "seed": seed, **fields}
    return task_of(model, **body)


def picture(seed: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def shown(task: ImageTask, *pictures: NDArray[np.uint8]) -> ImageTask:
    return replace(task, references=tuple(map(pixels_tensor, pictures)))


def of_flux2(folder: Path) -> ForwardInputs:
    saved(tiny_flux2.make(distilled=False), folder / "m")
    model = load_model(folder / "m", name="m", device="cpu", dtype="float32")
    one, two = picture(1, 64), picture(2, 64)
    company = [(one,), (two,), (one,), (one, two), (two, one), ()]
    return model, [shown(asked(model, seed), *them) for seed, them in enumerate(company)]


def of_kontext(folder: Path) -> ForwardInputs:
    saved(tiny_flux1.make(tiny_flux1.DEV, guided=True, kind=FluxKontextPipeline), folder / "m")
    model = load_model(folder / "m", name="m", device="cpu", dtype="float32")
    one, small = picture(1, 32), picture(2, 16)
    company = [(one,), (one,), (small,), (small,), (), ()]
    return model, [shown(asked(model, seed), *them) for seed, them in enumerate(company)]


def of_qwen_image_edit(folder: Path) -> ForwardInputs:
    # As in the 2511 release: its blocks get two times for each row.
    pipeline = tiny_qwen_image.make(QwenImageEditPlusPipeline, zero_cond_t=True)
    pipeline.save_pretrained(folder / "m")
    pipeline.processor.image_processor.save_pretrained(folder / "m" / "processor")
    model = load_model(folder / "m", name="m", device="cpu", dtype="float32")
    one, two = picture(1, 64), picture(2, 64)
    company = [(one,), (one,), (two,), (one, two), (two, one), (two, two)]
    tasks: list[ImageTask] = []
    for seed, them in enumerate(company):
        task = shown(asked(model, seed, guidance={"name": "cfg", "scale": 4.0}), *them)
        text = replace(task.text, pictures=tuple(map(SeenPicture.of, them)))
        tasks.append(replace(task, text=text))
    return model, tasks


def of_controls(folder: Path) -> ForwardInputs:
    pipeline = tiny_sd.make(BASE)
    pipeline.save_pretrained(folder / "m")
    tiny_controls.saved(tiny_controls.of_unet(pipeline.unet, 1), folder / "controls", "depth")
    model = load_model(folder / "m", name="m", device="cpu", dtype="float32")
    model.controls = tiny_controls.shelf_of(model, folder / "controls")
    depth = tiny_controls.use(model, "depth", 1, (WIDTH, HEIGHT))
    company = [(depth,), (depth,), (), (), ()]
    return model, [replace(asked(model, i), controls=them) for i, them in enumerate(company)]


def of_image_prompts(folder: Path) -> ForwardInputs:
    pipeline = tiny_sd.make(BASE)
    pipeline.save_pretrained(folder / "m")
    tiny_image_prompts.put_adapter(pipeline.unet, folder / "prompts", "plain", 1)
    tiny_image_prompts.put_encoder(folder / "prompts")
    model = load_model(folder / "m", name="m", device="cpu", dtype="float32")
    model.image_prompts = tiny_image_prompts.shelf_of(model, folder / "prompts")
    prompt = tiny_image_prompts.use(model, "plain", 1)
    company = [(prompt,), (prompt,), (), (), ()]
    return model, [replace(asked(model, i), image_prompts=them) for i, them in enumerate(company)]


@pytest.mark.parametrize(
    ("given", "compiled"),
    [
        (of_flux2, True),
        (of_kontext, True),
        (of_qwen_image_edit, True),
        (of_controls, True),
        (of_image_prompts, False),
    ],
)
def test_images_are_the_same_and_all_blocks_run_compiled_that_no_row_changes(
    given: Callable[[Path], ForwardInputs],
    compiled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "COMPILE_THRESHOLD", 2)
    monkeypatch.setattr(transformer_model, "DEFAULT_SIDE", WIDTH)
    model, tasks = given(tmp_path)
    engine = started(model, 16)

    def drawn() -> list[Tensor]:
        ear = run(engine, [replace(task, undecoded=True) for task in tasks])
        assert not ear.errors, ear.errors
        found = [ear.results[index].latents for index in range(len(tasks))]
        return [one for one in found if one is not None]

    plain = drawn()
    compiler = Copied()
    compile_blocks(model, compiler)
    drawn()
    compiler.work()
    shapes = len(compiler.asked)
    assert compilation_of(model) == Compilation(compiled=shapes)
    called = 0

    def count(*_: object) -> None:
        nonlocal called
        called += 1

    kinds = {type(job.skeleton) for job, *_ in compiler.asked}
    [network] = [one for part, one in model.modules().items() if part in DENOISERS]
    for block in network.modules():
        if type(block) in kinds:
            block.register_forward_pre_hook(count)
    torch.testing.assert_close(drawn(), plain, rtol=1e-5, atol=1e-5)
    engine.stop(0)
    assert compiler.ran == called
    assert (compiler.ran > 0) == compiled
