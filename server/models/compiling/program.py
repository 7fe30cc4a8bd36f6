"""Compiles a block for any number of rows, and checks that the result may replace it.

This takes the steps of ``torch.compile`` ahead of time: torch.export traces the block, and inductor
compiles the graph. The weights are inputs, so one program serves all blocks that are alike. There
are no guards, so nothing can trigger a recompilation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from server.models.compiling.autocast import inline_disabled_autocast
from server.models.compiling.block_call import Layout, Operand
from server.models.compiling.halves import HalvedRows
from server.models.compiling.skeleton import weights_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = [
    "MAX_ROWS",
    "BlockJob",
    "Exported",
    "FlatBlock",
    "NotCompilable",
    "NotFaster",
    "check",
    "compile_to",
    "draw_weights",
    "export",
]

MAX_ROWS = 1024
"""Maximum number of rows that a program accepts."""

CLOSE = {torch.float32: 1e-5}
CLOSE_IN_HALF = 2e-2
"""Maximum difference from the block's own outputs, as a fraction of the largest of them."""

CHECKED_ROWS = 1, 2, 5
TIMED_ROWS = 1, 4
TIMED = 5
MAX_TIMED = 20
MIN_TIMED_S = 0.5
"""The fastest of at least ``TIMED`` calls counts, and of up to ``MAX_TIMED`` calls as long as they
take less than ``MIN_TIMED_S`` seconds together."""


class NotCompilable(Exception):
    """A block that must run eagerly; the reason is a clause."""


class NotFaster(NotCompilable):
    """The program was measured to be no faster than the block."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockJob:
    """A block to be compiled.

    Attributes:
        skeleton: see ``skeleton_of``.
        template: see ``template_of``.
        layout: layout of the tensors.
        device: torch's name of the device.
    """

    skeleton: nn.Module
    template: Any
    layout: Layout
    device: str


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A block as a graph whose inputs are its weights and its tensor arguments.

    Attributes:
        graph: takes weights, then tensors; returns a tuple of tensors.
        sample: weights and tensors with which it was traced.
    """

    graph: torch.fx.GraphModule
    sample: list[Tensor]


class FlatBlock(nn.Module):
    """A block as a function of tensors: first its weights, then those of its template."""

    def __init__(self, job: BlockJob) -> None:
        super().__init__()
        self._names = list(weights_of(job.skeleton))
        self._template = job.template
        # Not registered as a submodule, whose weights would become part of the graph.
        self._block = (job.skeleton,)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the block's outputs."""
        given = iter(tensors[len(self._names) :])
        args, kwargs = pytree.tree_map(
            lambda leaf: next(given) if isinstance(leaf, Operand) else leaf, self._template
        )
        weights = dict(zip(self._names, tensors, strict=False))
        put_out = functional_call(self._block[0], weights, args, kwargs)
        return tuple(one for one in pytree.tree_leaves(put_out) if isinstance(one, Tensor))


def export(job: BlockJob, weights: Sequence[Tensor]) -> Exported:
    """Trace a block for any number of rows.

    Args:
        job: the block.
        weights: see :func:`draw_weights`.

    Raises:
        NotCompilable: it cannot be traced that way.
    """
    sample = [*weights, *_given(job, _rows_to_trace(job))]
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    free: list[Any] = [
        {0: rows if each == 1 else each * rows} if each else None for each in job.layout.per_row
    ]
    dynamic = ((*[None] * len(weights), *free),)
    with HalvedRows():
        made = torch.export.export(
            FlatBlock(job), tuple(sample), dynamic_shapes=dynamic, strict=False
        )
    if len(made.graph_signature.user_inputs) != len(made.graph_signature.input_specs):
        raise NotCompilable("it reads tensors besides its weights and its inputs")
    inline_disabled_autocast(made.graph_module)
    return Exported(made.graph_module, sample)


def compile_to(exported: Exported, file: Path) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph, and write the program to a file that ``CompiledArtifact.load`` reads."""
    from torch._inductor import standalone_compile

    # Otherwise inductor treats graphs that differ only in sizes as the same, and returns the
    # first one's program for the others.
    torch.compiler.config.cache_key_tag = file.name
    sample: list[Any] = [*exported.sample]
    program = standalone_compile(exported.graph, sample, dynamic_shapes="from_graph")
    program.save(path=str(file), format="binary")
    return program


def check(
    job: BlockJob, program: Callable[..., Sequence[Tensor]], weights: Sequence[Tensor]
) -> tuple[float, float]:
    """Check that a program computes the same as its block, in less time.

    Args:
        job: the block.
        program: its compiled program.
        weights: see :func:`draw_weights`.

    Returns:
        Seconds taken by calls with several numbers of rows: of the block itself, and of the
        program.

    Raises:
        NotCompilable: the program's outputs differ.
        NotFaster: the program is not faster.
    """
    block = FlatBlock(job)
    for rows in CHECKED_ROWS:
        sample = [*weights, *_given(job, rows)]
        for own, other in zip(block(*sample), program(*sample), strict=True):
            close = CLOSE.get(own.dtype, CLOSE_IN_HALF)
            apart = (own - other).abs().max()
            if own.shape != other.shape or not apart <= close * own.abs().max():
                raise NotCompilable(f"compiled, its results differ by {float(apart):.1e}")
    block_s = program_s = 0.0
    for rows in TIMED_ROWS:
        times = _seconds((block, program), [*weights, *_given(job, rows)])
        block_s, program_s = block_s + times[0], program_s + times[1]
    if program_s >= block_s:
        raise NotFaster(
            f"compiled it takes {1000 * program_s:.2f} ms instead of {1000 * block_s:.2f}"
        )
    return block_s, program_s


def draw_weights(job: BlockJob) -> list[Tensor]:
    """Random weights for a block, scaled like trained ones so that activations do not grow."""
    source = torch.Generator(job.device).manual_seed(0)
    made: list[Tensor] = []
    for one in weights_of(job.skeleton).values():
        weight = _drawn(tuple(one.shape), one.stride(), one.dtype, source)
        made.append(weight.mul_(max(1, one[0].numel()) ** -0.5))
    return made


def _rows_to_trace(job: BlockJob) -> int:
    """A number of rows equal to no other dimension, as equal sizes would be unified in tracing."""
    fixed = {size for one in weights_of(job.skeleton).values() for size in one.shape}
    for leaf in pytree.tree_leaves(job.template):
        fixed.update(leaf.size if isinstance(leaf, Operand) else ())
    fixed.update(job.layout.fixed)
    return next(
        rows
        for rows in count(5)
        if fixed.isdisjoint(rows * each for each in job.layout.per_row if each)
    )


def _given(job: BlockJob, rows: int) -> list[Tensor]:
    """Random tensor arguments for a call with this many rows."""
    source = torch.Generator(job.device).manual_seed(rows)
    operands = [one for one in pytree.tree_leaves(job.template) if isinstance(one, Operand)]
    lengths = job.layout.lengths(rows)
    return [
        _drawn((length, *one.size), (step, *one.stride), one.dtype, source)
        for one, length, step in zip(operands, lengths, job.layout.strides, strict=True)
    ]


def _drawn(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, source: torch.Generator
) -> Tensor:
    made = torch.empty_strided(size, stride, dtype=dtype, device=source.device)
    if not (dtype.is_floating_point or dtype.is_complex):
        return made.fill_(1)
    kind = torch.complex64 if dtype.is_complex else torch.float32
    return made.copy_(torch.randn(size, generator=source, dtype=kind, device=source.device))


def _seconds(
    calls: Sequence[Callable[..., Sequence[Tensor]]], sample: Sequence[Tensor]
) -> list[float]:
    """Seconds of the fastest of several calls each, alternating, as a busy machine delays both."""
    best = [float("inf")] * len(calls)
    ends = perf_counter() + MIN_TIMED_S
    for number in range(MAX_TIMED):
        if number >= TIMED and perf_counter() > ends:
            break
        for which, call in enumerate(calls):
            began = perf_counter()
            # Reading one number synchronizes with the device.
            call(*sample)[0].flatten()[0].item()
            best[which] = min(best[which], perf_counter() - began)
    return best
