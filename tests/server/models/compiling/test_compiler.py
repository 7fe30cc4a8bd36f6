"""Blocks are traced for any number of rows, compiled in another process, and used in this one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Barrier, Event
from threading import enumerate as enumerate_threads
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from server.models.compiling import compiler as module
from server.models.compiling.block_call import layout_of, read, template_of
from server.models.compiling.compiler import BlockCompiler, missing_compiler
from server.models.compiling.model_blocks import compile_blocks
from server.models.compiling.program import (
    BlockJob,
    Exported,
    FlatBlock,
    NotCompilable,
    check,
    compile_to,
    draw_weights,
    export,
)
from server.models.compiling.skeleton import fingerprint, skeleton_of, weights_of
from server.models.loading import load_model
from tests.server.models import tiny_sdxl
from tests.server.models.alike import task_of
from tests.server.toy_model import run, started


class Block(nn.Module):
    """A small block of a transformer.

    Args:
        heads: heads of its attention, which no weight shows.
    """

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 24)

    def forward(self, hidden: Tensor, rope: Tensor, *, scale: float) -> tuple[Tensor, None]:
        parts = self.mix(self.norm(hidden) + rope).unflatten(-1, (3, self.heads, -1))
        mixed = nn.functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        return hidden + scale * mixed.transpose(1, 2).flatten(2), None


def job(block: nn.Module, *tensors: Tensor, **kwargs: Any) -> BlockJob:
    call = read(tensors, kwargs)
    assert call is not None
    layout = layout_of(call)
    assert layout is not None
    return BlockJob(skeleton_of(block), template_of(tensors, kwargs), layout, "cpu")


def own_job() -> BlockJob:
    return job(Block(), torch.zeros(3, 5, 8), torch.zeros(5, 8), scale=0.5)


def exported(one: BlockJob) -> Exported:
    return export(one, draw_weights(one))


def test_a_block_is_traced_for_every_number_of_rows() -> None:
    block = Block().requires_grad_(requires_grad=False)
    graph = exported(own_job()).graph
    for rows in (1, 2, 5, 64):
        hidden, rope = torch.randn(rows, 5, 8), torch.randn(5, 8)
        [made] = graph(*weights_of(block).values(), hidden, rope)
        assert torch.allclose(made, block(hidden, rope, scale=0.5)[0], atol=1e-6)


class Rotating(nn.Module):
    """A block with a region without autocast, like the rotary embedding of Z-Image."""

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            turned = torch.view_as_complex(hidden.unflatten(-1, (-1, 2))) * angles
        return hidden + torch.view_as_real(turned).flatten(-2)


def rotating_job() -> BlockJob:
    return job(Rotating(), torch.zeros(3, 5, 8), torch.zeros(5, 4, dtype=torch.complex64))


def test_a_region_without_autocast_is_part_of_the_graph() -> None:
    graph = exported(rotating_job()).graph
    assert list(graph.children()) == []
    for rows in (1, 5):
        hidden, angles = torch.randn(rows, 5, 8), torch.randn(5, 4, dtype=torch.complex64)
        [made] = graph(hidden, angles)
        assert torch.equal(made, Rotating()(hidden, angles))


class ToldTwice(nn.Module):
    """A block that gets two times for each row, like those of Qwen-Image-Edit."""

    def forward(self, hidden: Tensor, times: Tensor) -> Tensor:
        first, second = torch.chunk(times, 2, dim=0)
        return hidden * first.unsqueeze(1) + second.unsqueeze(1)


def test_two_entries_a_row_are_halved_for_every_number_of_rows() -> None:
    graph = exported(job(ToldTwice(), torch.zeros(3, 5, 8), torch.zeros(6, 8))).graph
    for rows in (1, 2, 5):
        hidden, times = torch.randn(rows, 5, 8), torch.randn(2 * rows, 8)
        [made] = graph(hidden, times)
        assert torch.equal(made, ToldTwice()(hidden, times))


def test_a_program_with_other_numbers_or_without_gain_is_refused() -> None:
    one = own_job()
    block, weights = FlatBlock(one), draw_weights(one)

    def slow(*tensors: Tensor) -> Sequence[Tensor]:
        for _ in range(5):
            block(*tensors)
        return block(*tensors)

    def wrong(*tensors: Tensor) -> Sequence[Tensor]:
        return [made + 1e-3 for made in block(*tensors)]

    with pytest.raises(NotCompilable, match="compiled, its results differ"):
        check(one, wrong, weights)
    with pytest.raises(NotCompilable, match=r"compiled it takes .* ms instead of"):
        check(one, slow, weights)


def test_blocks_are_alike_by_class_settings_and_shapes_and_not_by_weights_or_hooks() -> None:
    block, other = Block(), Block()
    block.register_forward_hook(lambda *_: None)
    mark = fingerprint(skeleton_of(block))
    assert fingerprint(skeleton_of(other)) == mark
    assert fingerprint(skeleton_of(Block(heads=4))) != mark
    assert fingerprint(skeleton_of(other.half())) != mark
    assert {one.device.type for one in weights_of(skeleton_of(block)).values()} == {"meta"}


def test_without_a_compiler_it_is_said_which_one_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_compiler() == (
        "there is no C++ compiler 'no-such-compiler'; install it, or set CXX"
    )


class TextPrompt:
    """What a compiler has reported."""

    def __init__(self) -> None:
        self.program: Callable[..., Sequence[Tensor]] | None = None
        self.said = ""
        self._event = Event()

    def __call__(self, program: Callable[..., Sequence[Tensor]] | None, said: str) -> None:
        self.program, self.said = program, said
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(500)


def test_what_was_refused_for_good_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    compiler, told = BlockCompiler(tmp_path), TextPrompt()
    file = tmp_path / f"{module.key_of('one', 'cpu')}.json"
    file.write_text(json.dumps({"reason": "it gains nothing", "lasting": True}))
    compiler.ask(own_job(), "one", told)
    told.wait()
    assert (told.program, told.said) == (None, "it gains nothing")


@pytest.mark.parametrize(
    "note",
    [
        b"[]",
        b'"reason"',
        b"null",
        b'{"reason": 5, "lasting": true}',
        b'{"reason": "so", "slow": true, "measurements": "1"}',
        b'{"block_ms": 1.0}',
        b'{"block_ms": "1", "program_ms": 1.0}',
        b'{"reason": "it gai',
        b'{"reason": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_note_that_cannot_be_used_counts_as_none(
    note: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(monkeypatch, lambda _: REFUSED)
    compiler, told = BlockCompiler(tmp_path), TextPrompt()
    file = tmp_path / f"{module.key_of('one', 'cpu')}.json"
    file.write_bytes(note)
    compiler.ask(own_job(), "one", told)
    told.wait()
    assert (told.said, len(processes.seen)) == ("it gains nothing", 1)
    assert json.loads(file.read_bytes()) == REFUSED | {"measurements": 1}


class Processes:
    """Stands in for the processes of a compiler: what they are sent, and what they answer."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Path], dict[str, Any] | None]
    ) -> None:
        self.seen: list[Path] = []
        self.made = self.ended = 0
        self._answer = answer
        monkeypatch.setattr(module, "CompilingProcess", self._make)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")

    def _make(self, _: Path) -> Processes:
        self.made += 1
        return self

    def compile(self, _: BlockJob, file: Path) -> dict[str, Any] | None:
        self.seen.append(file)
        return self._answer(file)

    def end(self) -> None:
        self.ended += 1


REFUSED = {"reason": "it gains nothing", "lasting": True}


def test_a_block_that_cannot_be_sent_to_another_process_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsent(file: Path) -> dict[str, Any]:
        if file.stem == module.key_of("one", "cpu"):
            raise TypeError("cannot pickle a lambda")
        return REFUSED

    processes = Processes(monkeypatch, unsent)
    compiler, told = BlockCompiler(tmp_path), [TextPrompt(), TextPrompt()]
    for name, one in zip(("one", "two"), told, strict=True):
        compiler.ask(own_job(), name, one)
        one.wait()
    assert told[0].said == "it cannot be sent to a compiler: cannot pickle a lambda"
    assert told[1].said == "it gains nothing"
    assert len(processes.seen) == 2


def test_several_blocks_are_compiled_at_once_and_all_processes_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Barrier(3)

    def answer(_: Path) -> dict[str, Any]:
        together.wait(60)
        return REFUSED

    processes = Processes(monkeypatch, answer)
    compiler, told = BlockCompiler(tmp_path, processes=3), [TextPrompt() for _ in range(6)]
    for number, one in enumerate(told):
        compiler.ask(own_job(), str(number), one)
    for one in told:
        one.wait()
    for thread in enumerate_threads():
        if thread.name == "weft-compile":
            thread.join(60)
    assert processes.ended == processes.made >= 3


def test_blocks_that_are_alike_are_compiled_once_for_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_answer = Event()

    def answer(_: Path) -> dict[str, Any]:
        may_answer.wait(60)
        return REFUSED

    processes = Processes(monkeypatch, answer)
    compiler, told = BlockCompiler(tmp_path, processes=3), [TextPrompt() for _ in range(4)]
    for name, one in zip(("one", "one", "two", "one"), told, strict=True):
        compiler.ask(own_job(), name, one)
    may_answer.set()
    for one in told:
        one.wait()
        assert one.said == "it gains nothing"
    assert sorted(processes.seen) == sorted(
        tmp_path / f"{module.key_of(name, 'cpu')}.program" for name in ("one", "two")
    )


def test_where_memory_is_short_blocks_are_compiled_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_room", lambda *_: False)
    at_work: list[Path] = []

    def answer(file: Path) -> dict[str, Any]:
        at_work.append(file)
        sleep(0.01)
        alone = at_work == [file]
        at_work.remove(file)
        return REFUSED if alone else {"reason": "not alone", "lasting": False}

    Processes(monkeypatch, answer)
    compiler, told = BlockCompiler(tmp_path, processes=3), [TextPrompt() for _ in range(5)]
    for number, one in enumerate(told):
        compiler.ask(own_job(), str(number), one)
    for one in told:
        one.wait()
        assert one.said == "it gains nothing"


def test_a_block_whose_process_has_ended_is_asked_for_again_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(monkeypatch, lambda _: None)
    for _ in range(2):
        compiler, told = BlockCompiler(tmp_path), TextPrompt()
        compiler.ask(own_job(), "one", told)
        told.wait()
        assert told.said == "the process that compiled it ended or took too long"
    assert len(processes.seen) == 2


def test_what_seemed_to_gain_nothing_is_measured_again_later_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{module.key_of('one', 'cpu')}.json"
    answer = {"reason": "compiled it takes 2 ms instead of 1", "lasting": True, "slow": True}
    measured: list[int] = []
    for hours in (0, 0, 2, 4, 6):
        if file.exists():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 3600 * hours))
        compiler, told = BlockCompiler(tmp_path), TextPrompt()
        processes = Processes(monkeypatch, lambda _: answer)
        compiler.ask(own_job(), "one", told)
        told.wait()
        assert told.said == answer["reason"]
        measured.append(len(processes.seen))
    assert measured == [1, 0, 1, 1, 0]


def test_what_nobody_wants_any_longer_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(monkeypatch, lambda _: {"reason": "an error", "lasting": False})
    compiler, unheard, told = BlockCompiler(tmp_path), TextPrompt(), TextPrompt()
    compiler.ask(own_job(), "one", unheard, lambda: False)
    compiler.ask(own_job(), "two", told)
    told.wait()
    assert (unheard.said, told.said, len(processes.seen)) == ("", "an error", 1)


COMPILES = pytest.mark.skipif(
    "WEFT_TEST_COMPILER" not in os.environ or missing_compiler() is not None,
    reason="compiles for minutes; set WEFT_TEST_COMPILER=1 where there is a C++ compiler",
)


@COMPILES
def test_a_compiled_block_comes_from_another_process_and_from_the_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiler = BlockCompiler(tmp_path)
    jobs = [
        job(nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU()), torch.zeros(3, 5, width))
        for width in (8, 16)
    ]
    for again in range(2):
        for number, one in enumerate(jobs):
            told = TextPrompt()
            compiler.ask(one, str(number), told)
            told.wait()
            if told.program is None:
                assert told.said.startswith("compiled it takes")
                continue
            weights = [torch.randn(w.shape) for w in weights_of(one.skeleton).values()]
            hidden = torch.randn(7, 5, 8 * (number + 1))
            [made] = told.program(*weights, hidden)
            [expected] = FlatBlock(one)(*weights, hidden)
            assert torch.allclose(made, expected, atol=1e-5)
        assert len(list(tmp_path.glob("*.json"))) == len(jobs), again


@COMPILES
# The process that compiles ignores compilers' warnings, too.
@pytest.mark.filterwarnings("ignore")
def test_a_program_with_a_region_without_autocast_can_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with torch.no_grad():
        compile_to(exported(rotating_job()), tmp_path / "program")
    assert (tmp_path / "program").stat().st_size


@COMPILES
def test_images_of_compiled_blocks_are_those_of_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    folder = tmp_path / "model"
    tiny_sdxl.saved(tiny_sdxl.make(EulerDiscreteScheduler()), folder)
    model = load_model(folder, name="m", device="cpu", dtype="float32")
    engine = started(model, 16)
    prompts = "a red circle", "a blue square and a star", "a star"

    def drawn() -> list[NDArray[np.uint8]]:
        tasks = [task_of(model, prompt=one, seed=3, steps=4) for one in prompts]
        return [one.pixels for _, one in sorted(run(engine, tasks).results.items())]

    plain = drawn()
    compile_blocks(model, BlockCompiler(tmp_path / "programs"))
    assert model.blocks is not None
    ends = monotonic() + 580
    while model.blocks.compilation.compiled == 0 or model.blocks.compilation.waiting:
        assert monotonic() < ends
        drawn()
    compiled = drawn()
    engine.stop(0)
    assert model.blocks.compilation.compiled > 0
    for ours, before in zip(compiled, plain, strict=True):
        assert np.abs(ours.astype(int) - before.astype(int)).max() <= 1
