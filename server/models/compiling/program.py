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
"""Calls of which the fastest counts."""


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


def export(job: BlockJob) -> Exported:
    """Trace a block for any number of rows.

    Raises:
        Unsuitable: it cannot be.
    """
    sample = _sample(job, _rows_to_trace(job))
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    free: list[Any] = [{0: rows} if size is None else None for size in job.layout.sizes]
    weights = len(sample) - len(free)
    made = torch.export.export(
        FlatBlock(job), tuple(sample), dynamic_shapes=((*[None] * weights, *free),), strict=False
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


def check(job: BlockJob, program: Callable[..., Sequence[Tensor]]) -> tuple[float, float]:
    """Hold a program to its block, with random weights.

    Returns:
        Seconds of calls of several numbers of rows: of the block itself, and of the program.

    Raises:
        Unsuitable: other numbers.
        NoGain: it takes no less time.
    """
    block = FlatBlock(job)
    for rows in CHECKED_ROWS:
        sample = _sample(job, rows)
        for own, other in zip(block(*sample), program(*sample), strict=True):
            close = CLOSE.get(own.dtype, CLOSE_IN_HALF)
            apart = (own - other).abs().max()
            if own.shape != other.shape or not apart <= close * own.abs().max():
                raise Unsuitable(f"compiled it gives other numbers, {float(apart):.1e} apart")
    block_s = program_s = 0.0
    for rows in TIMED_ROWS:
        sample = _sample(job, rows)
        block_s += _seconds(lambda sample=sample: block(*sample))
        program_s += _seconds(lambda sample=sample: program(*sample))
    if program_s >= block_s:
        raise NoGain(
            f"compiled it takes {1000 * program_s:.2f} ms in place of {1000 * block_s:.2f}"
        )
    return block_s, program_s


def _rows_to_trace(job: BlockJob) -> int:
    """A number that no other dimension has, as sizes that are equal would be taken for one."""
    fixed = {size for one in weights_of(job.skeleton).values() for size in one.shape}
    for leaf in pytree.tree_leaves(job.template):
        fixed.update(leaf.size if isinstance(leaf, Operand) else ())
    return next(rows for rows in count(5) if rows not in fixed.union(job.layout.sizes))


def _sample(job: BlockJob, rows: int) -> list[Tensor]:
    """Weights and tensors of a call of so many rows, at random."""
    generator = torch.Generator().manual_seed(rows)

    def drawn(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty_strided(size, stride, dtype=dtype, device=job.device)
        if not (dtype.is_floating_point or dtype.is_complex):
            return made.fill_(1)
        kind = torch.complex64 if dtype.is_complex else torch.float32
        return made.copy_(torch.randn(size, generator=generator, dtype=kind))

    # Of the size of trained weights, or numbers grow from layer to layer.
    weights = [
        drawn(tuple(one.shape), one.stride(), one.dtype).mul_(max(1, one[0].numel()) ** -0.5)
        for one in weights_of(job.skeleton).values()
    ]
    operands = [one for one in pytree.tree_leaves(job.template) if isinstance(one, Operand)]
    given = [
        drawn((rows if size is None else size, *one.size), (stride, *one.stride), one.dtype)
        for one, size, stride in zip(operands, *job.layout, strict=True)
    ]
    return [*weights, *given]


def _seconds(call: Callable[[], Sequence[Tensor]]) -> float:
    best = float("inf")
    for _ in range(TIMED):
        began = perf_counter()
        # Reading one number waits for the device.
        call()[0].flatten()[0].item()
        best = min(best, perf_counter() - began)
    return best
