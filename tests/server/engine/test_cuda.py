"""The engine on a GPU; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from embedded import MODEL_FOLDER
from server.engine.capture import CudaRecorder
from server.engine.cost_model import TickCost
from server.engine.graphs import Graphs
from server.models.adapters.adapter import Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.memory import measure, reclaim
from server.models.placement import Placement
from server.models.quantization import missing_package
from server.models.weights_held import bytes_of, offloaded_bytes_of
from tests.server.models.adapters.low_rank import adapter, changes

pytestmark = pytest.mark.cuda


def mix(task):
    return [
        task("unipc", "apg", "adaptive", seed=1),
        task("heun", "cfg_plus_plus", seed=2),
        task("euler_ancestral", "none", seed=3),
        task("dpm_solver_pp", "cfg", "interval", seed=4, previews=True),
    ]


@pytest.fixture(scope="module")
def on_gpu():
    return load_model(MODEL_FOLDER, name="embedded", device="cuda", dtype="float32")


def test_a_gpu_gives_the_pictures_that_the_cpu_gives(start, on_gpu, trained_engine, task, run):
    on_cpu = run(trained_engine, mix(task)).pixels()
    for ours, theirs in zip(run(start(model=on_gpu), mix(task)).pixels(), on_cpu, strict=True):
        # TF32 and other kernels: the picture agrees, but not its bits.
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 2


def test_a_gpu_that_is_named_by_its_number_draws_what_any_does(start, on_gpu, task, run):
    """It is the last one, which on some machines is not the first."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    numbered = load_model(MODEL_FOLDER, name="embedded", device=str(last), dtype="float32")
    expected, ours = (run(start(model=one), mix(task)).pixels() for one in (on_gpu, numbered))
    for one, theirs in zip(ours, expected, strict=True):
        assert np.abs(one.astype(int) - theirs.astype(int)).mean() < 2
    assert {one.device for one in numbered.modules()["unet"].parameters()} == {last}


def test_on_a_gpu_deterministic_images_are_bit_identical_in_any_company(start, on_gpu, task, run):
    engine = start(model=on_gpu, deterministic=True)
    together = run(engine, mix(task)).pixels()
    alone = [run(engine, [one]).pixels()[0] for one in mix(task)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def adapted(task, model):
    """Images with one adapter, with two, and with none."""
    networks = model.adaptable()
    ink, pastel = (
        Weighted(adapter(name, {part: changes(one, rank) for part, one in networks.items()}), 0.7)
        for name, rank in (("ink", 4), ("pastel", 8))
    )
    return [task(adapters=(ink,)), task(seed=8), task(seed=9, adapters=(pastel, ink))]


def test_adapters_on_a_gpu_give_the_pictures_that_they_give_on_the_cpu(
    start, trained, on_gpu, trained_engine, task, run
):
    on_cpu = run(trained_engine, adapted(task, trained)).pixels()
    ours = run(start(model=on_gpu), adapted(task, on_gpu)).pixels()
    for one, theirs in zip(ours, on_cpu, strict=True):
        assert np.abs(one.astype(int) - theirs.astype(int)).mean() < 2


def test_on_a_gpu_adapted_images_are_bit_identical_in_any_company(start, on_gpu, task, run):
    engine, images = start(model=on_gpu, deterministic=True), adapted(task, on_gpu)
    together = run(engine, images).pixels()
    alone = [run(engine, [one]).pixels()[0] for one in images]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_finite_and_books_device_time(start, task, run, dtype):
    model = load_model(MODEL_FOLDER, name="embedded", device="cuda", dtype=dtype)
    engine = start(model=model)
    assert not run(engine, mix(task)).errors
    assert engine.measurements.denoise_s > 0
    assert model.dtype == getattr(torch, dtype)


def test_a_model_that_comes_and_goes_leaves_the_memory_of_a_gpu_as_it_was(start, on_gpu, task, run):
    engine = start(model=on_gpu)

    def come_and_go() -> None:
        before = torch.cuda.memory_allocated(), measure(engine.device).free
        extra = load_model(MODEL_FOLDER, name="extra", device="cuda", dtype="float32")
        weights = bytes_of(extra)
        engine.add_model(extra)
        run(engine, [replace(task(), model="extra")]).pixels()
        assert torch.cuda.memory_allocated() - before[0] >= weights
        assert before[1] - measure(engine.device).free >= weights
        assert engine.remove_model("extra")

    run(engine, [task()]).pixels()
    # Once beforehand, since cuBLAS keeps 32 MiB for each stream that has used it.
    come_and_go()
    reclaim(engine.device)
    before = torch.cuda.memory_allocated()
    come_and_go()
    reclaim(engine.device)
    assert torch.cuda.memory_allocated() - before < bytes_of(on_gpu) / 10


class Cramped:
    """The real model, which allocates more memory than there is for more than three rows."""

    def __init__(self, model):
        self._model = model
        self.armed = False

    def __getattr__(self, name):
        return getattr(self._model, name)

    def evaluate(self, x, *more):
        if self.armed and len(x) > 3:
            torch.empty(2**44, dtype=torch.uint8, device="cuda")
        return self._model.evaluate(x, *more)

    def decode(self, latents):
        if self.armed and len(latents) > 1:
            torch.empty(2**44, dtype=torch.uint8, device="cuda")
        return self._model.decode(latents)


def test_running_out_of_memory_loses_no_image_and_gives_all_memory_back(start, on_gpu, task, run):
    cramped = Cramped(on_gpu)
    engine = start(model=cramped)
    tasks = [task("unipc", steps=4, seed=seed) for seed in range(8)]
    run(engine, tasks).pixels()
    before = torch.cuda.memory_allocated()
    cramped.armed = True
    run(engine, tasks).pixels()
    assert torch.cuda.memory_allocated() <= 1.01 * before


def test_images_that_finish_while_others_run_are_what_they_are_alone(start, on_gpu, task, run):
    """The decoder has a stream of its own, and must read what the ticks have written."""
    engine = start(model=on_gpu, deterministic=True)
    tasks = [
        task("unipc", steps=1 + seed % 7, seed=seed, previews=seed % 2 == 0) for seed in range(16)
    ]
    together = run(engine, tasks).pixels()
    alone = [run(engine, [one]).pixels()[0] for one in tasks]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def rows_of(model, rows, seed):
    """What a forward of some rows of the embedded model is given."""
    prompts = [f"{size} red circle" for size in ("a large", "a small", "a")] * rows
    told = model.stack(model.encode_prompts(prompts[:rows], 128, 128))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *model.latent_shape(128, 128), generator=generator).cuda()
    return x, torch.full((rows,), 100.0 + seed, device="cuda"), RowInputs(told)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@torch.inference_mode()
def test_recorded_forwards_equal_those_they_were_made_of_to_the_bit(dtype):
    model = load_model(MODEL_FOLDER, name="embedded", device="cuda", dtype=dtype)
    graphs = Graphs(model, CudaRecorder(model.device))
    cost = TickCost({1: 1.0})
    for rows in (1, 3, 8):
        graphs.evaluate(*rows_of(model, rows, 1), cost)
    while graphs.wanted:
        graphs.record()
    assert graphs.rows == [1, 3, 8]
    for seed, rows in enumerate((8, 1, 3, 1, 8)):
        given = rows_of(model, rows, 2 + seed)
        assert torch.equal(graphs.evaluate(*given, cost), model.evaluate(*given))


@torch.inference_mode()
def test_released_recordings_give_all_their_memory_back_and_can_be_made_again(on_gpu):
    graphs, cost = Graphs(on_gpu, CudaRecorder(on_gpu.device)), TickCost({1: 1.0})
    # What libraries keep for a stream stays.
    graphs.evaluate(*rows_of(on_gpu, 4, 0), cost)
    graphs.record()
    graphs.release()
    reclaim(on_gpu.device)
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        graphs._paused_until = 0.0
        for rows in (2, 4):
            graphs.evaluate(*rows_of(on_gpu, rows, 1), cost)
        while graphs.wanted:
            graphs.record()
        assert graphs.rows == [2, 4]
        assert torch.cuda.memory_reserved() > before
        graphs.release()
        reclaim(on_gpu.device)
        assert torch.cuda.memory_reserved() == before


def recorded_rows(engine):
    return engine.prepared(engine._models["embedded"]).recorded


def recorded(engine, run, tasks):
    """Run images, and wait until an idle engine has recorded the forwards of their sizes."""
    for one in tasks:
        run(engine, [one])
    run(engine, tasks)
    until = monotonic() + 120
    while not engine.settled:
        assert monotonic() < until, recorded_rows(engine)
        sleep(0.05)
    assert recorded_rows(engine)
    return engine


def test_recorded_ticks_draw_the_images_of_other_ticks_to_the_bit(
    start, on_gpu, task, run, monkeypatch
):
    # Kept however busy the machine is, since that affects how much time is saved.
    monkeypatch.setattr("server.engine.graphs.MAX_REPLAY_RATIO", 1e9)
    plain = start(model=on_gpu, cuda_graphs=False)
    images = [task("unipc", "cfg", seed=1), task("heun", "none", seed=2), task(previews=True)]
    # One after another, so that the numbers of rows are the same.
    expected = [run(plain, [one]).pixels()[0] for one in images]
    # Two engines must not run one model at once.
    plain.stop(0)
    engine = recorded(start(model=on_gpu), run, images)
    launched, evaluate = [], on_gpu.evaluate
    monkeypatch.setattr(
        on_gpu, "evaluate", lambda x, *more: launched.append(len(x)) or evaluate(x, *more)
    )
    for one, theirs in zip(images, expected, strict=True):
        assert np.array_equal(run(engine, [one]).pixels()[0], theirs)
    assert launched == []


def test_the_decoder_works_beside_recorded_ticks(start, on_gpu, task, run):
    tasks = [task("unipc", steps=1 + seed % 7, seed=seed) for seed in range(24)]
    engine = recorded(start(model=on_gpu), run, tasks)
    together = run(engine, tasks).pixels()
    alone = [run(engine, [one]).pixels()[0] for one in tasks]
    for ours, theirs in zip(together, alone, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 1


def test_forwards_are_recorded_between_the_ticks_of_a_server_that_is_never_idle(
    start, on_gpu, task, run, monkeypatch
):
    monkeypatch.setattr("server.engine.idle_work.QUIET_S", 1000.0)
    monkeypatch.setattr("server.engine.idle_work.PIECE_REST", 0)
    tasks = [task("unipc", steps=10 + seed % 7, seed=seed) for seed in range(24)]
    plain = start(model=on_gpu, cuda_graphs=False)
    expected = run(plain, tasks).pixels()
    plain.stop(0)
    engine = start(model=on_gpu)
    run(engine, [task(steps=120)])
    assert recorded_rows(engine)
    for ours, theirs in zip(run(engine, tasks).pixels(), expected, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 1


def test_adapted_rows_run_beside_recorded_forwards_as_they_are(start, on_gpu, task, run):
    images = adapted(task, on_gpu)
    plain = start(model=on_gpu, cuda_graphs=False)
    expected = run(plain, images).pixels()
    plain.stop(0)
    engine = recorded(start(model=on_gpu), run, images)
    for ours, theirs in zip(run(engine, images).pixels(), expected, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 1


def test_a_streamed_model_draws_the_same_pictures_in_a_part_of_the_memory(start, on_gpu, task, run):
    whole = run(start(model=on_gpu), [*mix(task), *adapted(task, on_gpu)]).pixels()
    streamed = load_model(
        MODEL_FOLDER,
        name="embedded",
        device="cuda",
        dtype="float32",
        placement=Placement("none", "all"),
    )
    # The adapters of the model on the device: a streamed one says that its weights are elsewhere.
    ours = run(start(model=streamed), [*mix(task), *adapted(task, on_gpu)]).pixels()
    for one, theirs in zip(ours, whole, strict=True):
        assert np.abs(one.astype(int) - theirs.astype(int)).mean() < 2
    assert bytes_of(streamed) < 0.7 * bytes_of(on_gpu)
    assert bytes_of(streamed) + offloaded_bytes_of(streamed) == pytest.approx(bytes_of(on_gpu))


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_dora_of_a_streamed_model_is_compared_with_its_weights(start, task, run, tmp_path, kind):
    if package := missing_package(kind):
        pytest.skip(f"{package} is not installed")
    whole, streamed = (
        load_model(
            MODEL_FOLDER,
            name="embedded",
            device="cuda",
            dtype="float32",
            placement=Placement(kind, offload),
        )
        for offload in ("none", "all")
    )
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = whole.modules()["unet"].get_parameter(f"{layer}.weight").shape[1]
    file = tmp_path / "dora.safetensors"
    shapes = {"A.weight": (2, width), "B.weight": (width, 2)}
    tensors = {f"unet.{layer}.lora_{name}": torch.rand(shape) for name, shape in shapes.items()}
    save_file({**tensors, f"unet.{layer}.lora_magnitude_vector": torch.rand(width)}, file)
    engines = [start(model=one) for one in (whole, streamed)]
    before = run(engines[1], [task("euler", "none")]).pixels()
    adapters = [
        AdapterFile.read("dora", file, Target.of("embedded", one.adaptable())).load(
            one.device, one.dtype
        )
        for one in (whole, streamed)
    ]
    expected, ours = (one.parts["unet"][layer].magnitude for one in adapters)
    assert expected is not None
    assert ours is not None
    assert ours.norms.device.type == "cuda"
    torch.testing.assert_close(ours.norms, expected.norms)
    adapted_task = replace(task("euler", "none"), adapters=(Weighted(adapters[1], 1.0),))
    drawn = [run(one, [adapted_task]).pixels()[0] for one in engines]
    assert np.abs(drawn[0].astype(int) - drawn[1].astype(int)).mean() < 2
    assert np.abs(drawn[1].astype(int) - before[0].astype(int)).mean() > 2


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_quantised_weights_draw_on_a_gpu_what_they_draw_on_a_cpu(start, task, run, kind):
    if package := missing_package(kind):
        pytest.skip(f"{package} is not installed")
    on_cpu, on_gpu = (
        load_model(
            MODEL_FOLDER, name="embedded", device=device, dtype="float32", placement=Placement(kind)
        )
        for device in ("cpu", "cuda")
    )
    expected, ours = (run(start(model=one), mix(task)).pixels() for one in (on_cpu, on_gpu))
    for one, theirs in zip(ours, expected, strict=True):
        assert np.abs(one.astype(int) - theirs.astype(int)).mean() < 4
