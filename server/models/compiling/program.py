"""Compiles a block for any number of rows, and shows that the result may take its place.

The steps of ``torch.compile`` are taken beforehand: torch.export traces the block, and inductor
compiles the graph. Its weights are inputs, so that one program serves all blocks that are alike.
There are no guards, so that nothing can ever make it compile again.
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
    "MOST_ROWS",
    "BlockJob",
    "Exported",
    "FlatBlock",
    "NoGain",
    "Unsuitable",
    "check",
    "compile_to",
    "draw_weights",
    "export",
]

MOST_ROWS = 1024
"""Of a program."""

CLOSE = {torch.float32: 1e-5}
CLOSE_IN_HALF = 2e-2
"""By how much of the largest number outputs may differ from those of the block itself."""

CHECKED_ROWS = 1, 2, 5
TIMED_ROWS = 1, 4
TIMED = 5
MOST_TIMED = 20
TIMED_S = 0.5
"""Calls of which the fastest counts: so many, and more as long as they take less time than this."""


class Unsuitable(Exception):
    """A block runs as ever; the reason is a clause."""


class NoGain(Unsuitable):
    """Its program takes as long as the block, as measured once."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockJob:
    """A block that is to be compiled.

    Attributes:
        skeleton: see ``skeleton_of``.
        template: see ``template_of``.
        layout: of the tensors.
        device: by torch's name.
    """

    skeleton: nn.Module
    template: Any
    layout: Layout
    device: str


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A block as a graph of its weights and of what it is given.

    Attributes:
        graph: takes weights, then tensors; gives a tuple of tensors.
        sample: weights and tensors that it was traced with.
    """

    graph: torch.fx.GraphModule
    sample: list[Tensor]


class FlatBlock(nn.Module):
    """A block as a function of tensors: of its weights, then of those in its template."""

    def __init__(self, job: BlockJob) -> None:
        super().__init__()
        self._names = list(weights_of(job.skeleton))
        self._template = job.template
        # Not as a submodule, whose weights would be made part of the graph.
        self._block = (job.skeleton,)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the block puts out, tensors only."""
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
        Unsuitable: it cannot be.
    """
    sample = [*weights, *_given(job, _rows_to_trace(job))]
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    free: list[Any] = [
        {0: rows if each == 1 else each * rows} if each else None for each in job.layout.per_row
    ]
    dynamic = ((*[None] * len(weights), *free),)
    with HalvedRows():
        made = torch.export.export(
            FlatBlock(job), tuple(sample), dynamic_shapes=dynamic, strict=False
        )
    if len(made.graph_signature.user_inputs) != len(made.graph_signature.input_specs):
        raise Unsuitable("it reads tensors beside its weights and what it is given")
    inline_disabled_autocast(made.graph_module)
    return Exported(made.graph_module, sample)


def compile_to(exported: Exported, file: Path) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph, and write the program to a file that ``CompiledArtifact.load`` reads."""
    from torch._inductor import standalone_compile

    # Else inductor takes graphs for the same that differ in sizes alone, and gives the first one's
    # program for the others.
    torch.compiler.config.cache_key_tag = file.name
    sample: list[Any] = [*exported.sample]
    program = standalone_compile(exported.graph, sample, dynamic_shapes="from_graph")
    program.save(path=str(file), format="binary")
    return program


def check(
    job: BlockJob, program: Callable[..., Sequence[Tensor]], weights: Sequence[Tensor]
) -> tuple[float, float]:
    """Hold a program to its block.

    Args:
        job: the block.
        program: of it.
        weights: see :func:`draw_weights`.

    Returns:
        Seconds of calls of several numbers of rows: of the block itself, and of the program.

    Raises:
        Unsuitable: other numbers.
        NoGain: it takes no less time.
    """
    block = FlatBlock(job)
    for rows in CHECKED_ROWS:
        sample = [*weights, *_given(job, rows)]
        for own, other in zip(block(*sample), program(*sample), strict=True):
            close = CLOSE.get(own.dtype, CLOSE_IN_HALF)
            apart = (own - other).abs().max()
            if own.shape != other.shape or not apart <= close * own.abs().max():
                raise Unsuitable(f"compiled it gives other numbers, {float(apart):.1e} apart")
    block_s = program_s = 0.0
    for rows in TIMED_ROWS:
        times = _seconds((block, program), [*weights, *_given(job, rows)])
        block_s, program_s = block_s + times[0], program_s + times[1]
    if program_s >= block_s:
        raise NoGain(
            f"compiled it takes {1000 * program_s:.2f} ms in place of {1000 * block_s:.2f}"
        )
    return block_s, program_s


def draw_weights(job: BlockJob) -> list[Tensor]:
    """Random ones for a block, of the size of trained ones: else numbers grow with the layers."""
    source = torch.Generator(job.device).manual_seed(0)
    made: list[Tensor] = []
    for one in weights_of(job.skeleton).values():
        weight = _drawn(tuple(one.shape), one.stride(), one.dtype, source)
        made.append(weight.mul_(max(1, one[0].numel()) ** -0.5))
    return made


def _rows_to_trace(job: BlockJob) -> int:
    """A number that no other dimension has, as sizes that are equal would be taken for one."""
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
    """Tensors of a call of so many rows, at random."""
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
    """Of the fastest of several calls of each; they take turns, as a busy machine delays both."""
    best = [float("inf")] * len(calls)
    ends = perf_counter() + TIMED_S
    for number in range(MOST_TIMED):
        if number >= TIMED and perf_counter() > ends:
            break
        for which, call in enumerate(calls):
            began = perf_counter()
            # Reading one number waits for the device.
            call(*sample)[0].flatten()[0].item()
            best[which] = min(best[which], perf_counter() - began)
    return best
