"""Scheduling of preparation: before the engine is ready, in quiet moments, and between ticks."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from math import inf
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING

from server.engine.autoencoder_calls import decoder_of, encoder_of
from server.engine.capture import CudaRecorder
from server.engine.faults import attempt, free_memory
from server.engine.preparation import AT_START, Preparation, PreparedForwards

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    import torch
    from torch import Tensor

    from server.engine.cost_model import TickCost
    from server.engine.forwards import Forwards
    from server.models.hosted import HostedModel

__all__ = ["IdleWork"]

log = logging.getLogger(__name__)

QUIET_S = 1.0
"""Seconds without work after which the engine prepares for later work."""

PIECE_REST = 4
"""Minimum pause after a piece of preparation between ticks, in multiples of its duration."""


class IdleWork:
    """Runs pieces of preparation when they delay nobody, or little.

    It belongs to the engine's thread, except for :meth:`undisturbed`, :attr:`settled` and
    :meth:`prepared`.

    Args:
        device: device of all models.
        prepares: whether to run forward passes at few numbers of rows, or at the fixed one, and
            these before they are needed; if not, there is nothing to do here.
        records: whether to record the prepared passes as CUDA graphs.
        max_bytes: maximum bytes of the device for weights and graphs of all models together.
        fixed: whether passes have fixed rows; a recording must then equal its pass bit for bit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        prepares: bool,
        records: bool,
        max_bytes: float = inf,
        fixed: bool = False,
    ) -> None:
        self._device = device
        self._preparation: Preparation | None = None
        if prepares:
            recorder_of = _recorder_of if records else None
            self._preparation = Preparation(recorder_of, max_bytes, fixed=fixed)
        self._undisturbed = Lock()
        self._settled = False
        self._paused_until = -inf

    @contextmanager
    def undisturbed(self) -> Generator[None]:
        """Prevent preparation inside the ``with`` block, after waiting for a piece under way.

        Call it from any thread but the engine's.
        """
        with self._undisturbed:
            yield

    @property
    def settled(self) -> bool:
        """Whether nothing is under way and nothing is left to prepare; safe from any thread."""
        return self._settled

    def add(self, model: HostedModel, cost: TickCost, max_rows: int) -> None:
        """Prepare a model from now on.

        Args:
            model: loaded model.
            cost: cost of its ticks at its default size.
            max_rows: maximum number of rows in a forward pass.
        """
        if self._preparation is not None:
            self._preparation.add(model, model.default_shape, cost, max_rows)

    def forget(self, name: str) -> None:
        """Release a model."""
        if self._preparation is not None:
            self._preparation.forget(name)

    def forwards(
        self, model: HostedModel, shape: tuple[int, int, int], cost: TickCost, max_rows: int
    ) -> Forwards | None:
        """The forward passes of a model at a latent shape; None if they are not prepared."""
        if self._preparation is None:
            return None
        return self._preparation.forwards(model, shape, cost, max_rows)

    def encoder_of(self, model: HostedModel, tiny: bool) -> Callable[[Tensor], Tensor]:
        """The function that encodes pictures for a model, with recordings if they are prepared."""
        calls = None if self._preparation is None else self._preparation.autoencoder(model)
        return encoder_of(model, tiny) if calls is None else partial(calls.encode, tiny=tiny)

    def decoder_of(self, model: HostedModel, tiny: bool) -> Callable[[Tensor], Tensor]:
        """The function that decodes latents of a model, with recordings if they are prepared."""
        calls = None if self._preparation is None else self._preparation.autoencoder(model)
        return decoder_of(model, tiny) if calls is None else partial(calls.decode, tiny=tiny)

    def prepared(self, model: HostedModel) -> PreparedForwards:
        """What has been prepared for the passes of a model; safe from any thread."""
        if self._preparation is None:
            return PreparedForwards()
        return self._preparation.of(model.facts.name, model.default_shape)

    @property
    def recorded_bytes(self) -> int:
        """Bytes of memory that recordings hold; safe from any thread."""
        return 0 if self._preparation is None else self._preparation.recorded_bytes

    def release(self) -> bool:
        """Free the memory of all recordings; return whether there was any."""
        released = self._preparation is not None and self._preparation.release()
        if released:
            free_memory(self._device)
        return released

    def free_unused_memory(self) -> bool:
        """Free all memory that is not needed now; return whether recordings held any of it."""
        released = self.release()
        if not released:
            free_memory(self._device)
        return released

    def before_ready(self, models: Iterable[HostedModel]) -> None:
        """Prepare the forward passes of the first models, except the large ones."""
        if self._preparation is None:
            return
        while piece := self._preparation.next(AT_START):
            self._do(piece)
        for model in models:
            sizes = ", ".join(map(str, self.prepared(model).rows))
            log.info("%s: forward passes are warmed up at %s rows", model.facts.name, sizes or "no")

    def until(self, wait: Callable[[float | None], bool], live: Callable[[], bool]) -> None:
        """Prepare in quiet moments until there is other work.

        Args:
            wait: function that waits for other work, at most some seconds, and returns whether
                there is any.
            live: function that returns whether frames of live streams are expected; the pauses
                between them are shorter than a piece.
        """
        quiet_s: float | None = QUIET_S
        while not wait(quiet_s):
            quiet_s = QUIET_S if live() else self._next()
            self._settled = quiet_s is None
        self._settled = False

    def beside_ticks(self, max_s: float) -> None:
        """Run a small piece between ticks, for lack of quiet moments.

        Args:
            max_s: maximum seconds that it may take.
        """
        if self._preparation is None or monotonic() < self._paused_until:
            return
        piece = self._preparation.next_beside_ticks(max_s)
        if piece is None or not self._undisturbed.acquire(blocking=False):
            return
        began = monotonic()
        try:
            self._do(piece)
        finally:
            self._undisturbed.release()
        self._paused_until = monotonic() + PIECE_REST * (monotonic() - began)

    def _next(self) -> float | None:
        """Run a piece; return the seconds to wait before the next one, or None if none is left."""
        if not self._undisturbed.acquire(blocking=False):
            return QUIET_S
        try:
            piece = None if self._preparation is None else self._preparation.next()
            if piece is None:
                return None
            self._do(piece)
            return 0.0
        finally:
            self._undisturbed.release()

    def _do(self, piece: Callable[[], object]) -> None:
        failed = attempt(piece, self._device)
        if isinstance(failed, Exception):
            log.warning("a warm-up ahead of its use failed", exc_info=failed)
            free_memory(self._device)


def _recorder_of(model: HostedModel) -> CudaRecorder:
    return CudaRecorder(model.device)
