"""The repeated blocks of a denoiser, which run compiled as soon as their programs are ready.

Until then a block runs eagerly, so no request waits for a compiler. Forward passes with rows that
use adapters, or that change something inside the network, always run eagerly: hooks inside the
blocks make these changes, and a compiled program has no hooks.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from server.models.compiling.block_call import Layout, fits, layout_of, read, template_of
from server.models.compiling.program import MAX_ROWS, BlockJob
from server.models.compiling.skeleton import fingerprint, skeleton_of, weights_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Hashable, Sequence

    from server.models.compiling.block_call import BlockCall

__all__ = ["Compilation", "CompiledBlocks", "Compiler"]

log = logging.getLogger("weft")

COMPILE_THRESHOLD = 40
"""Number of calls with the same shapes after which a block is compiled for them."""

MAX_SHAPES = 64
"""Maximum number of shapes compiled per model: a U-Net has about 18 for each image size."""

EVICTION_AGE_S = 600.0
"""Seconds without a call after which a shape may be evicted for another one. In some families,
prompts of ever new lengths would otherwise occupy all places."""

COUNTED = 1024
"""Maximum number of shapes whose calls are counted, as clients may ask for ever new sizes."""

SWITCH_DELAY_S = 120.0
"""Seconds that finished programs wait for others, so that forward passes switch over only once.
Clients that ask for ever new sizes must not delay the programs of the usual one indefinitely."""

DEVICE_ERRORS = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError
"""Errors that are not the program's fault: the uncompiled block would raise them, too."""


class Compiler(Protocol):
    """Compiles in the background."""

    def ask(
        self,
        job: BlockJob,
        identity: str,
        on_done: Callable[[Callable[..., Sequence[Tensor]] | None, str], None],
        wanted: Callable[[], bool],
    ) -> None:
        """See ``BlockCompiler.ask``."""
        ...


class Compilation(NamedTuple):
    """How far the blocks of a model are compiled.

    Attributes:
        compiled: number of block shapes that run compiled.
        waiting: number of shapes that are being compiled or queued.
        eager: number of shapes that will always run eagerly.
        reason: why the most recent of these runs eagerly, or why nothing is compiled.
    """

    compiled: int = 0
    waiting: int = 0
    eager: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """A compiled block and the layout that it accepts."""

    run: Callable[..., Sequence[Tensor]]
    layout: Layout
    put_out: pytree.TreeSpec
    constants: tuple[Any, ...]

    def __call__(self, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        made = iter(self.run(*weights, *tensors))
        leaves = [next(made) if one is Tensor else one for one in self.constants]
        return pytree.tree_unflatten(leaves, self.put_out)


class CompiledBlocks:
    """Routes calls of a network's blocks to their compiled programs.

    Args:
        name: name of the model, for the log.
        network: network whose blocks are compiled; already on its device, and never moved again.
        kinds: class names of these blocks.
        device: device of the network.
        compiler: compiles the programs.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        kinds: Sequence[str],
        device: torch.device,
        compiler: Compiler,
    ) -> None:
        self.generation = 0
        self._name = name
        self._device = str(device)
        self._compiler = compiler
        self._in_use = False
        self._lock = Lock()
        self._calls: dict[Hashable, int] = {}
        self._waiting: set[Hashable] = set()
        self._programs: dict[Hashable, _Program] = {}
        self._ready: dict[Hashable, _Program] = {}
        self._reasons: dict[Hashable, str] = {}
        self._called_at: dict[Hashable, float] = {}
        self._forward_at = 0.0
        self._changes_at = 0.0
        for block in network.modules():
            if type(block).__name__ in kinds:
                self._wrap(block)

    @property
    def compilation(self) -> Compilation:
        """Progress of the compilation; safe from any thread."""
        with self._lock:
            reason = next(reversed(self._reasons.values()), None)
            waiting = len(self._waiting) + len(self._ready)
            return Compilation(len(self._programs), waiting, len(self._reasons), reason)

    @contextmanager
    def running(self, *, plain: bool) -> Generator[None]:
        """Let blocks run compiled in the forward pass inside the ``with`` block.

        Args:
            plain: whether no row changes anything inside the network.
        """
        self._in_use = plain
        self._forward_at = monotonic()
        try:
            yield
        finally:
            self._in_use = False

    def _wrap(self, block: nn.Module) -> None:
        skeleton = skeleton_of(block)
        kind, eager, weights = fingerprint(skeleton), block.forward, [*weights_of(block).values()]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._in_use or torch.is_grad_enabled():
                return eager(*args, **kwargs)
            call = read(args, kwargs)
            if call is None:
                return eager(*args, **kwargs)
            key = kind, call.key
            program = self._programs.get(key)
            if program is not None and fits(program.layout, call.tensors, MAX_ROWS):
                self._called_at[key] = self._forward_at
                try:
                    return program(weights, call.tensors)
                except DEVICE_ERRORS:
                    raise
                except Exception as error:  # noqa: BLE001 - the block itself is still there
                    self._give_up(key, type(skeleton).__name__, error)
            put_out = eager(*args, **kwargs)
            if program is None and self._wants(key):
                template = template_of(args, kwargs)
                self._ask(key, skeleton, call, template, put_out)
            return put_out

        block.forward = forward

    def _wants(self, key: Hashable) -> bool:
        """Whether a shape has now been called often enough to be compiled."""
        with self._lock:
            if any(key in one for one in self._known):
                self._called_at[key] = self._forward_at
                return False
        calls = self._calls.pop(key, 0) + 1
        # Reinserted at the end, so that the least recently called shapes are dropped first.
        self._calls[key] = calls
        while len(self._calls) > COUNTED:
            del self._calls[next(iter(self._calls))]
        return calls >= COMPILE_THRESHOLD

    def _ask(
        self, key: Hashable, skeleton: nn.Module, call: BlockCall, template: Any, put_out: Any
    ) -> None:
        layout = layout_of(call)
        if layout is None:
            return
        leaves, structure = pytree.tree_flatten(put_out)
        constants = tuple(Tensor if isinstance(one, Tensor) else one for one in leaves)
        with self._lock:
            if not self._make_room():
                return
            self._waiting.add(key)
            self._called_at[key] = self._forward_at
        heard = WeakMethod(self._hear)

        def on_done(run: Callable[..., Sequence[Tensor]] | None, said: str) -> None:
            # A model that has been unloaded in the meantime is not notified.
            hear = heard()
            if hear is not None:
                program = None if run is None else _Program(run, layout, structure, constants)
                hear(key, type(skeleton).__name__, program, said)

        job = BlockJob(skeleton, template, layout, self._device)
        identity = repr((key, template, layout))
        self._compiler.ask(job, identity, on_done, lambda: heard() is not None)

    @property
    def _known(self) -> tuple[Collection[Hashable], ...]:
        """The shapes that count toward ``MAX_SHAPES``."""
        return self._waiting, self._ready, self._programs, self._reasons

    def _make_room(self) -> bool:
        """Whether one more shape may be compiled, after evicting an unused one if necessary."""
        if sum(map(len, self._known)) < MAX_SHAPES:
            return True
        ended = [*self._programs, *self._reasons]
        last = min(ended, key=self._called_at.__getitem__, default=None)
        if last is None or self._called_at[last] > self._forward_at - EVICTION_AGE_S:
            return False
        if last in self._programs:
            # CUDA graphs that replay the program must not outlive it.
            self.generation += 1
        self._programs = {one: kept for one, kept in self._programs.items() if one != last}
        self._reasons.pop(last, None)
        del self._called_at[last]
        return True

    def _hear(self, key: Hashable, block: str, program: _Program | None, said: str) -> None:
        with self._lock:
            self._waiting.discard(key)
            news = said not in self._reasons.values()
            if program is None:
                self._reasons[key] = said
            else:
                if not self._ready:
                    self._changes_at = monotonic() + SWITCH_DELAY_S
                self._ready[key] = program
            if self._ready and (not self._waiting or monotonic() >= self._changes_at):
                # All at once, so that costs are measured and CUDA graphs recorded again only once.
                self._programs = {**self._programs, **self._ready}
                self._ready = {}
                self.generation += 1
            compiled, waiting = len(self._programs), len(self._waiting)
        if program is None and news:
            log.warning("%s: a %s is not compiled: %s", self._name, block, said)
        elif program is not None:
            log.info("%s: a %s is compiled: %s", self._name, block, said)
        if not waiting:
            log.info("%s: blocks of %d shapes run compiled", self._name, compiled)

    def _give_up(self, key: Hashable, block: str, error: Exception) -> None:
        """Run the blocks of a shape eagerly from now on, because their program failed."""
        said = f"its program failed: {type(error).__name__}: {error}"
        with self._lock:
            self._programs = {one: kept for one, kept in self._programs.items() if one != key}
            self._reasons[key] = said
            self.generation += 1
        log.warning("%s: a %s runs eagerly: %s", self._name, block, said)
