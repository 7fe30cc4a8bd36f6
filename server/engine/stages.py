"""Execution of stages, which also teaches what ticks cost and what fits into memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import TYPE_CHECKING

from server.engine.faults import attempt, is_out_of_memory
from server.engine.state.lane import largest
from server.engine.state.sequence import units_of
from server.engine.tick.stage import Stage, run_stage
from server.models.memory import unused_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from server.engine.metrics import EngineMeasurements
    from server.engine.row_watch import RowWatch
    from server.engine.state.lanes import Lanes
    from server.engine.state.overflows import Overflows
    from server.engine.state.sequence import Sequence

__all__ = ["Failure", "Stages"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """An error of one image, or of the images of one group."""

    images: list[Sequence]
    error: Exception


class Stages:
    """Runs a stage of several images at once, and of fewer if that fails.

    The objects that it is given belong to the engine and change with it.

    Args:
        device: device of all models.
        lanes: all lanes.
        overflows: record of what did not fit into memory by itself.
        measurements: counters of the engine.
        row_watch: watch that samples the ticks.
        free_unused_memory: function that frees memory which is not needed, and returns whether
            recordings held any of it.
        meanwhile: function that is called in each stage while the device works.
    """

    def __init__(
        self,
        device: torch.device,
        lanes: Lanes,
        overflows: Overflows,
        measurements: EngineMeasurements,
        row_watch: RowWatch,
        free_unused_memory: Callable[[], bool],
        meanwhile: Callable[[], None],
    ) -> None:
        self._device = device
        self._lanes = lanes
        self._overflows = overflows
        self._measurements = measurements
        self._row_watch = row_watch
        self._free_unused_memory = free_unused_memory
        self._meanwhile = meanwhile

    def run(self, chosen: list[Sequence]) -> Iterator[Stage | Failure]:
        """Run a stage; on an error split the images until the error is one image's or group's.

        Args:
            chosen: images of lanes that share a forward pass, those of a group side by side; either
                all of them recall the stage, or none.

        Yields:
            Each part that has run, or failed.

        Raises:
            DeviceLost: the device no longer answers.
        """
        stage = attempt(lambda: self._stage(chosen), self._device)
        if isinstance(stage, Stage):
            yield stage
        else:
            yield from self._divided(chosen, stage)

    def _divided(self, chosen: list[Sequence], error: Exception) -> Iterator[Stage | Failure]:
        """Run the two halves of images that fail together; a single image or group fails."""
        units, again = units_of(chosen), False
        if is_out_of_memory(error):
            again = self._make_room(chosen)
        if len(units) > 1:
            half = len(units) // 2
            yield from self.run([*chain(*units[:half])])
            yield from self.run([*chain(*units[half:])])
        elif again:
            yield from self.run(chosen)
        else:
            log.error("an image failed in its stage", exc_info=error)
            if is_out_of_memory(error) and not chosen[0].recalls:
                self._note_overflow(chosen)
            yield Failure(chosen, error)

    def _make_room(self, chosen: list[Sequence]) -> bool:
        """Free memory; return whether the images that did not fit may fit now by themselves."""
        filled_up = False
        # Without a forward pass, the failure says nothing about how many rows fit.
        if not chosen[0].recalls:
            lane, rows = largest(one.lane for one in chosen), sum(one.rows for one in chosen)
            mixed = any(one.lane is not lane for one in chosen)
            filled_up = lane.size_of(rows, mixed=mixed) > rows
            lane.row_cap.overflow(rows)
        # The memory may have been taken by recordings, or by padding rows.
        return self._free_unused_memory() or filled_up

    def _note_overflow(self, chosen: list[Sequence]) -> None:
        """Remember images that did not fit by themselves, so that images as large are refused."""
        task, free = chosen[0].task, unused_bytes(self._device)
        # Memory of ControlNets must not lead to refusing as many rows without them.
        rows = ceil(sum(one.work * one.lane.reads for one in chosen))
        self._overflows.note(task.model, task.width, task.height, rows, free)

    def _stage(self, chosen: list[Sequence]) -> Stage:
        lanes, m = {sequence.lane for sequence in chosen}, self._measurements
        rows = sum(sequence.rows for sequence in chosen)
        work = sum(sequence.work for sequence in chosen)
        widest = largest(lanes)
        mixed = len(lanes) > 1
        size = widest.fixed_rows or widest.size_of(rows, mixed=mixed)
        known = widest.sizes_known
        stage = run_stage(chosen, self._meanwhile)
        if chosen[0].recalls:
            m.weave_s += stage.seconds
            return stage
        m.ticks += 1
        m.rows_per_tick[rows] += 1
        m.evaluations += rows
        m.denoise_s += stage.denoise_s
        m.weave_s += stage.seconds - stage.denoise_s
        if widest.sizes_known == known:
            # The first pass of a size says nothing about later ones, and the time of this one's
            # ControlNets is not part of others.
            observe = widest.cost.observe_mixed if mixed else widest.cost.observe
            moved = observe(size, stage.seconds * rows / work)
            # Smaller sizes, which mostly join others' ticks, follow the machine by larger ones.
            for lane in self._lanes:
                if lane.mixes_with(widest) and lane.area < widest.area:
                    lane.cost.shift(moved)
        widest.row_cap.fit(rows)
        self._row_watch.see(stage.batches, m.ticks, stage.seconds, m.pending)
        return stage
