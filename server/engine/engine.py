"""The tick loop: admit, select, evaluate, guide, advance, retire."""

from __future__ import annotations

import logging
from collections import deque
from itertools import chain
from threading import Condition, Thread
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import torch

from server.engine.metrics import EngineMeasurements
from server.engine.reservation import Reservation
from server.engine.scheduler import Candidate, select
from server.engine.state.lane import Lane
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.terms.particles import resample
from server.engine.tick import weave
from server.engine.tick.decode import decode
from server.engine.tick.newcomers import Admission
from server.engine.tick.preview import fit_preview, preview
from server.engine.tick.stopwatch import Stopwatch
from server.engine.warmup import BATCHES, row_budget_of, sweep
from server.errors import Cancelled, InvalidRequest, NotReady, Overloaded, RowFailed

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from collections.abc import Sequence as Listed

    from torch import Tensor

    from server.engine.state.sequence import Listener
    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel

log = logging.getLogger(__name__)

LEAST_BUDGET = 2
"""Rows that an image with one branch needs at once."""

LEAST_MEASURED = 8
"""Rows of the widest guidance that is common; fewer would refuse it on slow machines."""

FIXED_ROWS_MULTIPLE = 8
"""At other batch sizes a CPU's kernels treat the last rows differently: at 5, 6 and 7 rows of the
embedded model the bits of a row depend on its place, at multiples of 4 they do not."""

ADMITTED_A_TICK = 16

LANES_KEPT = 8
"""Lanes kept for their next image though none is under way in them."""


class Engine:
    """Weaves the rows of all images under way through one forward a tick, in its own thread.

    Args:
        models: hosted models by name, all on one device.
        row_budget: rows of a forward, at least 2; measured at start-up, and then at least 8, if
            None.
        deterministic: run everything at fixed batch shapes, so that an image's bits do not depend
            on what else is in the batch.
        max_pending: images waiting or under way; more are refused.
    """

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        *,
        row_budget: int | None = None,
        deterministic: bool = False,
        max_pending: int = 256,
    ) -> None:
        if row_budget is not None and row_budget < LEAST_BUDGET:
            raise ValueError(
                f"row_budget is {row_budget}; at least {LEAST_BUDGET} is needed for guidance."
            )
        self.ready = False
        self.failure: Exception | None = None
        self.measurements = EngineMeasurements()
        self._models = models
        self._asked_budget = row_budget
        self._deterministic = deterministic
        self._max_pending = max_pending
        self._rate = 0.0
        self._fixed_rows: int | None = None
        self._lanes: dict[Hashable, Lane] = {}
        self._admission = Admission(models, self._lane_of, deterministic=deterministic)
        self._colours: dict[str, Tensor] = {}
        self._arrived: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        self._wake = Condition()
        self._stop_at: float | None = None
        self._thread = Thread(target=self._run, name="weft-engine", daemon=True)

    def start(self) -> None:
        """Warm up and start to work, in the engine's own thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Take no more work, give what is under way ``timeout_s`` seconds, then end the rest."""
        with self._wake:
            self._stop_at = monotonic() + timeout_s
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def reserve(self, images: int) -> Reservation:
        """Room for the images of one request; safe from any thread.

        Reserve before uploads are decoded or plans are made, so that a request that is turned away
        costs nothing. Submit to the reservation, and release it whatever happens.

        Raises:
            Overloaded: there is no room for all of them.
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        with self._wake:
            self._check_open()
            if self.measurements.pending + images > self._max_pending:
                self.measurements.refused += images
                raise Overloaded(self._seconds_of_work())
            self.measurements.pending += images
        return Reservation(images, self._take_in, self._give_back)

    def submit(self, tasks: Listed[ImageTask], listener: Listener) -> Submission:
        """Queue the images of one request, for which no room was reserved; safe from any thread.

        Raises:
            Overloaded: there is no room for all of them.
            NotReady: the engine is not warm yet, or has stopped or failed.
            InvalidRequest: an image or a group needs more rows at once than a forward has.
        """
        with self.reserve(len(tasks)) as room:
            return room.submit(tasks, listener)

    def _take_in(self, tasks: Listed[ImageTask], listener: Listener) -> Submission:
        submission = Submission(len(tasks))
        tick = self.measurements.ticks
        sequences = [
            Sequence(task, index, listener, submission, tick) for index, task in enumerate(tasks)
        ]
        self._check_width(sequences)
        with self._wake:
            self._check_open()
            self._arrived.extend(sequences)
            self._wake.notify()
        return submission

    def _give_back(self, images: int) -> None:
        with self._wake:
            self.measurements.pending -= images

    def _check_open(self) -> None:
        if not self.ready or self._stop_at is not None:
            raise NotReady("The server takes no work now; it is starting or stopping.")

    def _check_width(self, sequences: Listed[Sequence]) -> None:
        """Nothing is taken in that no tick could ever run."""
        budget = self.measurements.row_budget
        for members in _units(sequences):
            rows = sum(member.guidance.widest for member in members)
            if rows > budget:
                images = len(members)
                together = f" for the {images} images of its group" if images > 1 else ""
                fewer = "images, branches" if images > 1 else "branches"
                raise InvalidRequest(
                    "guidance",
                    f"guidance needs {rows} rows of a forward at once{together}; at most {budget} "
                    f"are allowed here, so ask for fewer {fewer} or perturbations.",
                )

    def _seconds_of_work(self) -> float:
        waiting = sum(sequence.remaining for sequence in [*self._arrived, *self._active])
        return max(1.0, waiting / self._rate) if self._rate else 1.0

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._warm_up()
                while self._wait_for_work():
                    self._tick()
        except Exception as error:
            log.exception("the engine failed")
            self.failure = error
        finally:
            self.ready = False
            self._end_everything()

    def _warm_up(self) -> None:
        asked = self._asked_budget
        budgets: list[int] = []
        for name, model in self._models.items():
            self._colours[name] = fit_preview(model)
            model.decode(torch.zeros(1, *self._default_shape(model), device=model.device))
            rates = sweep(model, BATCHES if asked is None else (asked,))
            log.info("%s evaluates, in rows/s by batch size: %s", name, rates)
            budgets.append(row_budget_of(rates))
            self._rate = max(self._rate, *rates.values())
        # One budget for all, which none of them finds too large.
        self.measurements.row_budget = asked or max(LEAST_MEASURED, min(budgets))
        if self._deterministic:
            multiples = -(-self.measurements.row_budget // FIXED_ROWS_MULTIPLE)
            self._fixed_rows = multiples * FIXED_ROWS_MULTIPLE
        self.ready = True
        log.info("ready; %d rows a tick", self.measurements.row_budget)

    def _default_shape(self, model: HostedModel) -> tuple[int, int, int]:
        return model.latent_shape(model.facts.default_width, model.facts.default_height)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; False when it is time to end."""
        with self._wake:
            while not (self._arrived or self._active or self._stop_at is not None):
                self._wake.wait()
            if self._stop_at is None:
                return True
            return bool(self._arrived or self._active) and monotonic() < self._stop_at

    def _tick(self) -> None:
        self._admit()
        chosen = self._select()
        if chosen:
            self._weave(chosen)
            self._retire([sequence for sequence in chosen if sequence.done])

    def _admit(self) -> None:
        """Take in newcomers, and let go of what was cancelled, before any work is done for it."""
        newcomers: list[Sequence] = []
        with self._wake:
            while self._arrived and (
                len(newcomers) < ADMITTED_A_TICK or _together(newcomers[-1], self._arrived[0])
            ):
                newcomers.append(self._arrived.popleft())
        self._active.extend(newcomers)
        cancelled = {sequence for sequence in self._active if sequence.submission.cancelled}
        for sequence in cancelled:
            self._fail(sequence, Cancelled())
        began = perf_counter()
        staying = [sequence for sequence in newcomers if sequence not in cancelled]
        for sequence, error in self._admission.admit(staying):
            self._fail(sequence, error)
        if staying:
            self.measurements.encode_s += perf_counter() - began

    def _select(self) -> list[Sequence]:
        tick = self.measurements.ticks
        candidates = [
            Candidate(
                s.rows,
                s.remaining,
                tick - s.arrived_tick,
                s.task.priority,
                id(s.lane),
                None if s.task.group is None else id(s.task.group),
            )
            for s in self._active
        ]
        return [self._active[i] for i in select(candidates, self.measurements.row_budget)]

    def _weave(self, chosen: list[Sequence]) -> None:
        """Run a stage of the chosen; halve them on an error until it is one image's or group's."""
        for sequence in chosen:
            if not sequence.started_at:
                sequence.started_at = monotonic()
                sequence.listener.started(sequence.index)
        try:
            outcome = self._stage(chosen)
        except Exception as error:
            units = _units(chosen)
            if len(units) == 1:
                log.exception("an image failed in its stage")
                for sequence in chosen:
                    self._fail(sequence, error)
                return
            half = len(units) // 2
            self._weave([*chain(*units[:half])])
            self._weave([*chain(*units[half:])])
            return
        for sequence, finite, settled, denoised in zip(chosen, *outcome, strict=True):
            if not finite:
                self._fail(sequence, RowFailed(_broken(sequence)))
                continue
            self._report(sequence, denoised)
            sequence.settled |= settled

    def _stage(self, chosen: list[Sequence]) -> tuple[list[bool], list[bool], Tensor]:
        """Evaluate, guide and advance; nothing is written unless all of it succeeds.

        Returns:
            Of each image: whether its prediction is finite, whether its guidance ends here, and
            the prediction.
        """
        began = perf_counter()
        lane = chosen[0].lane
        rows = weave.pack(lane, chosen, self._fixed_rows)
        watch = Stopwatch(lane.model.device)
        with watch:
            predictions = weave.evaluate(rows)
        guidance = weave.guide(rows, predictions)
        state = weave.step(rows, guidance)
        finite = guidance.denoised.flatten(1).sum(1).isfinite()
        # The tick's one wait for the device.
        sound, settled = torch.stack([finite, guidance.settled]).tolist()
        denoised = guidance.denoised
        resampling = resample(rows, predictions, sound) if rows.groups else None
        if resampling is not None:
            state, denoised = resampling.taken_over(state), resampling.taken_over(denoised)
            sound = [sound[origin] for origin in resampling.origins]
        weave.write_back(rows, state, guidance)
        if resampling is not None:
            resampling.note(chosen)
        denoise_s = watch.seconds()
        self._book(rows.rows, denoise_s, perf_counter() - began - denoise_s)
        return sound, settled, denoised

    def _book(self, rows: int, denoise_s: float, weave_s: float) -> None:
        m = self.measurements
        m.ticks += 1
        m.rows_per_tick[rows] += 1
        m.evaluations += rows
        m.denoise_s += denoise_s
        m.weave_s += weave_s

    def _report(self, sequence: Sequence, denoised: Tensor) -> None:
        closes, plan = sequence.closes_step, sequence.task.plan
        sequence.count()
        if not closes:
            return
        small = None
        if sequence.task.previews and not sequence.done:
            small = preview(denoised, self._colours[sequence.task.model])
        done = plan.step[sequence.stage - 1] + 1
        sequence.listener.progress(sequence.index, done, plan.steps, small)

    def _retire(self, done: list[Sequence]) -> None:
        if not done:
            return
        now, began = monotonic(), perf_counter()
        for sequence in done:
            sequence.denoised_at = now
        for sequence, outcome in decode(done, fixed=self._deterministic):
            if isinstance(outcome, Exception):
                self._fail(sequence, outcome)
                continue
            if not sequence.submission.finish():
                self._fail(sequence, Cancelled())
                continue
            self.measurements.images += 1
            if sequence.saved:
                self.measurements.saved[sequence.task.policy.name] += sequence.saved
            self._leave(sequence)
            sequence.listener.finished(sequence.index, outcome)
        self.measurements.decode_s += perf_counter() - began

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if isinstance(error, Cancelled):
            self.measurements.cancelled += 1
        else:
            self.measurements.failed += 1
        sequence.submission.fail()
        self._leave(sequence)
        sequence.listener.failed(sequence.index, error)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            sequence.lane.pool.give_back(sequence.slot)
            sequence.slot = -1
        self._active.remove(sequence)
        self._give_back(1)

    def _lane_of(self, task: ImageTask, length: int) -> Lane:
        model = self._models[task.model]
        shape = model.latent_shape(task.width, task.height)
        key = task.model, shape, model.group_key(task.width, task.height, length)
        if key not in self._lanes:
            self._forget_idle_lanes()
            self._lanes[key] = Lane(model, shape)
        return self._lanes[key]

    def _forget_idle_lanes(self) -> None:
        """Requests of ever new sizes must not fill the memory with empty pools."""
        idle = [key for key, lane in self._lanes.items() if lane.pool.idle]
        for key in idle[: max(0, len(self._lanes) + 1 - LANES_KEPT)]:
            del self._lanes[key]

    def _end_everything(self) -> None:
        with self._wake:
            # Nothing is accepted from here on, whatever ended the loop.
            self._stop_at = self._stop_at or monotonic()
            self._active.extend(self._arrived)
            self._arrived.clear()
        reason = "the server stopped" if self.failure is None else "the engine failed"
        for sequence in list(self._active):
            self._fail(sequence, NotReady(f"The image was not finished, because {reason}."))


def _units(sequences: Listed[Sequence]) -> list[list[Sequence]]:
    """Images by themselves, and groups, whose members stand side by side."""
    units: list[list[Sequence]] = []
    for sequence in sequences:
        if units and _together(units[-1][-1], sequence):
            units[-1].append(sequence)
        else:
            units.append([sequence])
    return units


def _together(one: Sequence, other: Sequence) -> bool:
    return one.task.group is not None and one.task.group is other.task.group


def _broken(sequence: Sequence) -> str:
    step = sequence.task.plan.step[sequence.stage] + 1
    return (
        f"The image became NaN or infinite at step {step} of {sequence.task.plan.steps}; "
        "a lower guidance scale or another sampler may help."
    )
