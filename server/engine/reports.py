"""Notification of listeners about their images: start, progress, previews, and the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeAlias

from server.engine.faults import attempt
from server.engine.tick.host_copy import HostCopy
from server.engine.tick.preview import previews

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Listed

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.state.sequence import ImageResult, Sequence

__all__ = ["Reports"]

log = logging.getLogger(__name__)

StepsDone: TypeAlias = "tuple[Sequence, int]"
"""An image, and the number of its sampler steps that are done."""


class Reports:
    """Notifies listeners; an error of a listener cancels its own images and no others.

    A notified listener wakes up and runs Python, for which the engine's thread has to wait. So
    steps are reported while the device works on the next ones (:meth:`report_steps`).

    Args:
        device: device of all models.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._colors: dict[str, Tensor] = {}
        self._previewed: list[tuple[list[StepsDone], HostCopy]] = []
        self._unreported: list[StepsDone] = []

    def add(self, model: str, colors: Tensor) -> None:
        """Draw previews of a model with these colors, see ``fit_preview``."""
        self._colors[model] = colors

    def forget(self, model: str) -> None:
        """Release a model that has no image under way."""
        # Images with unreported steps hold their lane, and the lane holds the model.
        self.report_steps()
        del self._colors[model]

    def started(self, sequence: Sequence) -> None:
        """Report that an image is about to be evaluated for the first time."""
        _notify(sequence, sequence.listener.started, sequence.index)

    def finished(self, sequence: Sequence, result: ImageResult) -> None:
        """Report that an image is done."""
        _notify(sequence, sequence.listener.finished, sequence.index, result)

    def failed(self, sequence: Sequence, error: Exception) -> None:
        """Report that an image ended without a picture."""
        _notify(sequence, sequence.listener.failed, sequence.index, error)

    def last_stages(self, frames: Listed[Sequence]) -> None:
        """Note that the last evaluation of some live frames begins.

        Listeners are notified with the next :meth:`report_steps`, while a GPU runs it: the next
        frame of the stream has to be there when these leave their places in the denoiser.
        """
        self._unreported += [(frame, frame.task.plan.steps) for frame in frames]

    def steps(self, closed: list[tuple[Sequence, int]], denoised: Tensor) -> None:
        """Note that a stage has closed sampler steps, and start the previews that are wanted.

        Listeners are notified with the next :meth:`report_steps`.

        Args:
            closed: images of one lane, at their next stage, each with its row of the predictions.
            denoised: predictions, ``[rows, C, h, w]``.
        """
        wanted: list[StepsDone] = []
        rows: list[int] = []
        for sequence, row in closed:
            if sequence.live and sequence.done:
                # Reported when the stage began.
                continue
            progress = sequence, sequence.task.plan.step[sequence.stage - 1] + 1
            if sequence.task.previews and not sequence.done:
                wanted.append(progress)
                rows.append(row)
            else:
                self._unreported.append(progress)
        if wanted:
            self._preview(wanted, denoised, rows)

    def report_steps(self) -> None:
        """Report all closed steps; waits for previews, which are made before a stage."""
        self.report_plain_steps()
        previewed, self._previewed = self._previewed, []
        for wanted, copy in previewed:
            fetched = attempt(copy.fetch, self._device)
            failed = isinstance(fetched, Exception)
            pictures = [None] * len(wanted) if failed else fetched[0].numpy()
            for progress, picture in zip(wanted, pictures, strict=True):
                _report_progress(progress, picture)

    def report_plain_steps(self) -> None:
        """Report steps without a preview; the last step of every image is one of them."""
        unreported, self._unreported = self._unreported, []
        for progress in unreported:
            _report_progress(progress, None)

    def _preview(self, wanted: list[StepsDone], denoised: Tensor, rows: list[int]) -> None:
        """Start the previews of a tick."""
        lane, colors = wanted[0][0].lane, self._colors[wanted[0][0].task.model]
        made = attempt(
            lambda: HostCopy(previews(denoised.index_select(0, lane.indices(rows)), colors)),
            self._device,
        )
        if isinstance(made, Exception):
            log.warning("previews failed", exc_info=made)
            self._unreported += wanted
            return
        self._previewed.append((wanted, made))


def _report_progress(progress: StepsDone, picture: NDArray[np.uint8] | None) -> None:
    sequence, step = progress
    if sequence.slot >= 0:
        arguments = sequence.index, step, sequence.task.plan.steps, picture
        _notify(sequence, sequence.listener.progress, *arguments)


def _notify(sequence: Sequence, call: Callable[..., None], *said: Any) -> None:
    try:
        call(*said)
    except Exception:
        log.exception("a listener failed; its images are cancelled")
        sequence.submission.cancel()
