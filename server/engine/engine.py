"""The tick loop: admit, select, evaluate, guide, advance, retire.

A tick is one round of the loop: one forward pass, and the stages that it completes. A row is one
entry of the pass's batch, that is one evaluation of the denoiser for one image.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from itertools import chain
from math import inf
from threading import Condition, Thread
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from server.engine.backlog import Amounts, Bounds
from server.engine.chores import Chores
from server.engine.client import ANONYMOUS, Client
from server.engine.cost_model import MAX_ROWS, CostModel, TickCost
from server.engine.fair_queue import MAX_LEAD_S
from server.engine.faults import free_memory, is_out_of_memory, lost_device
from server.engine.forwards import MAX_PIECE_S
from server.engine.idle_work import IdleWork
from server.engine.metrics import EngineMeasurements
from server.engine.reception import Reception
from server.engine.reports import Reports
from server.engine.row_watch import RowWatch
from server.engine.selection import Selection
from server.engine.stages import Failure, Stages
from server.engine.state.arrivals import Arrivals
from server.engine.state.lanes import Lanes
from server.engine.state.overflows import Overflows
from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.tick.decode import Decoder
from server.engine.tick.newcomers import Admission
from server.engine.tick.pictures import TickPictures
from server.engine.warmup import common_fixed_rows, warm_up, warm_up_beside_ticks
from server.errors import Cancelled, DeviceLost, NotReady, OutOfMemory
from server.models.memory import unused_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Sequence as Listed
    from contextlib import AbstractContextManager

    from server.engine.preparation import PreparedForwards
    from server.engine.reservation import Reservation
    from server.engine.state.sequence import ImageResult, Listener
    from server.engine.task import ImageTask
    from server.engine.tick.stage import Outcome
    from server.engine.warmup import WarmUpResult
    from server.models.hosted import HostedModel

Result = TypeVar("Result")

log = logging.getLogger(__name__)

MIN_BUDGET = 2
"""Minimum row budget: the rows that an image with one branch needs at once."""

FIXED_ROWS_MULTIPLE = 8
"""At other batch sizes a CPU's kernels treat the last rows differently: at 5, 6 and 7 rows of the
embedded model the bits of a row depend on its position, at multiples of 4 they do not."""

ADMITTED_A_TICK = 16

ADMITTED_BESIDE_LIVE = 2
"""Maximum number of ordinary images admitted per tick while live frames are expected, which wait
while these are encoded."""


class Engine:
    """Weaves the rows of all images under way into one forward pass per tick, in its own thread.

    Args:
        models: hosted models by name, at least one, all on one device. Others may be added and
            removed while it runs.
        row_budget: maximum number of rows in a forward pass, at least 2; the number of each tick is
            chosen from what waits and from the cost of ticks. In deterministic mode every pass has
            exactly this many. If it is None, deterministic mode takes the smallest number that is
            about as good as larger ones by the costs at start-up, and more for images that need
            more at once.
        live_tick_s: maximum seconds of a tick while images of live priority are under way, unless
            shorter ticks would cost a fifth of the throughput.
        deterministic: whether to run everything at fixed batch shapes, so that an image's bits do
            not depend on what else is in the batch.
        max_pending: maximum number of images waiting or under way; more are refused. Frames of live
            streams are counted separately.
        max_pending_s: maximum seconds of the device that these images may need, as estimated.
        max_pending_bytes: maximum bytes that they may need, as estimated.
        on_failure: function that is called in the engine's thread when the engine has failed for
            good, after all listeners have been notified.
        guessed_costs: initial seconds of a tick by number of rows, which ticks then correct. By
            default forward passes are timed at start-up, which takes longer than one image.
        prepares: whether to run forward passes at few numbers of rows only, and all of these before
            they are needed: some at start-up, the others while nothing waits. In deterministic mode
            there is one number only. Defaults to True on a GPU.
        cuda_graphs: whether to record the prepared forward passes on a GPU, and replay them. In
            deterministic mode a recording is kept only if it equals its pass bit for bit.
        max_bytes: maximum bytes of the device for weights and graphs of all models together; only
            graphs are bounded here, since loading of weights has its own check.

    Attributes:
        selecting: class that chooses the images of each tick; benchmarks replace it.
    """

    selecting: ClassVar[type[Selection]] = Selection

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        *,
        row_budget: int | None = None,
        live_tick_s: float = 0.1,
        deterministic: bool = False,
        max_pending: int = 1024,
        max_pending_s: float = inf,
        max_pending_bytes: float = inf,
        on_failure: Callable[[], None] | None = None,
        guessed_costs: Mapping[int, float] | None = None,
        prepares: bool | None = None,
        cuda_graphs: bool = True,
        max_bytes: float = inf,
    ) -> None:
        if row_budget is not None and row_budget < MIN_BUDGET:
            raise ValueError(
                f"row_budget is {row_budget}; at least {MIN_BUDGET} is needed for guidance."
            )
        self.ready = False
        self.failure: BaseException | None = None
        self.measurements = EngineMeasurements()
        self.row_watch = RowWatch()
        self._models = dict(models)
        self._requested_budget = row_budget
        self._deterministic = deterministic
        self._on_failure = on_failure
        self._guessed_costs = guessed_costs
        self._device = next(iter(models.values())).device
        self._live_tick_s = live_tick_s
        self._selection = self.selecting(self.measurements, live_tick_s)
        self._costs = CostModel()
        on_gpu = self._device.type == "cuda"
        self._idle_work = IdleWork(
            self._device,
            prepares=on_gpu if prepares is None else prepares,
            records=on_gpu and cuda_graphs,
            max_bytes=max_bytes,
            fixed=deterministic,
        )
        self._overflows = Overflows()
        self._lanes = Lanes(
            self._models,
            self._costs,
            self.measurements,
            self._idle_work.forwards,
            # A forward pass of another shape may sum in another order.
            mixed=not deterministic,
        )
        self._stages = Stages(
            self._device,
            self._lanes,
            self._overflows,
            self.measurements,
            self.row_watch,
            self._idle_work.free_unused_memory,
            self._meanwhile,
        )
        self._admission = Admission(
            self._models, self._lanes.of, self._idle_work.encoder_of, deterministic=deterministic
        )
        self._reports = Reports(self._device)
        self._uncounted: set[Sequence] = set()
        self._arrived = Arrivals()
        self._deferred = 0
        self._active: list[Sequence] = []
        self._decoder = Decoder(
            self._device,
            self._selection.turns,
            self._idle_work.free_unused_memory,
            self._idle_work.decoder_of,
            self._interrupted,
            fixed=deterministic,
        )
        self._wake = Condition()
        self._chores = Chores(self._wake)
        self._stop_at: float | None = None
        self._reception = Reception(
            self._models,
            Bounds(max_pending, max_pending_s, max_pending_bytes),
            wake=self._wake,
            arrived=self._arrived,
            overflows=self._overflows,
            costs=self._costs,
            measurements=self.measurements,
            pace=lambda: self._selection.pace,
            check_open=self._check_open,
        )
        self._thread = Thread(target=self._run, name="weft-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's own thread, which warms up and begins to work."""
        self._thread.start()

    def stop(self, timeout_s: float, last_tick_s: float | None = None) -> None:
        """Accept no more work, give images under way ``timeout_s`` seconds, then end the rest.

        Args:
            timeout_s: seconds for images under way.
            last_tick_s: maximum seconds to wait after that for a tick, which nothing can interrupt;
                None waits until it ends.
        """
        with self._wake:
            self._stop_at = monotonic() + timeout_s
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(None if last_tick_s is None else timeout_s + last_tick_s)

    @property
    def device(self) -> torch.device:
        """The device of all models."""
        return self._device

    def add_model(self, model: HostedModel) -> None:
        """Serve another model, on the same device, from the next tick on.

        The first forward passes of the model run in the caller's thread, so that ticks continue
        meanwhile. They are only a few: its ticks teach the rest of its cost.

        Args:
            model: loaded model with a name that no other has; it belongs to the engine from now on.

        Raises:
            MemoryError: not even one row of it fits in memory.
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        self._check_open()
        with torch.inference_mode():
            result = warm_up_beside_ticks(model)
        self._in_own_thread(lambda: self._take_model(model, result))

    def undisturbed(self) -> AbstractContextManager[None]:
        """Keep the engine from preparing later work while another thread uses the device.

        Loading a model and freeing memory would spoil a CUDA graph during its capture. Ticks
        continue.
        """
        return self._idle_work.undisturbed()

    @property
    def settled(self) -> bool:
        """Whether nothing is under way and nothing is left to prepare; safe from any thread."""
        return self._idle_work.settled

    @property
    def recorded_bytes(self) -> int:
        """Bytes of memory that CUDA graphs hold; safe from any thread."""
        return self._idle_work.recorded_bytes

    def release_recordings(self) -> bool:
        """Free the memory of CUDA graphs, which are recorded again later; safe from any thread.

        Returns:
            Whether there were any.

        Raises:
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        return self._in_own_thread(self._idle_work.release)

    def remove_model(self, name: str) -> bool:
        """Stop serving a model, and release all that was made for it; safe from any thread.

        Returns:
            Whether it was removed; it stays while any of its images is waiting or under way.

        Raises:
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        return self._in_own_thread(lambda: self._let_go_of_model(name))

    def _in_own_thread(self, work: Callable[[], Result]) -> Result:
        with self._wake:
            self._check_open()
            done = self._chores.ask(work)
        return done.result()

    def _take_model(self, model: HostedModel, result: WarmUpResult) -> None:
        name = model.facts.name
        self._reports.add(name, result.colors)
        self._costs.start(name, model.default_shape, result.cost)
        m = self.measurements
        self._idle_work.add(model, result.cost, m.fixed_rows or m.row_budget)
        self._admission.add(name, model)
        with self._wake:
            self._models[name] = model

    def _let_go_of_model(self, name: str) -> bool:
        with self._wake:
            if any(one.task.model == name for one in chain(self._arrived, self._active)):
                return False
            del self._models[name]
        self._reports.forget(name)
        self._costs.forget(name)
        self._admission.forget(name)
        self._overflows.forget()
        self._idle_work.forget(name)
        self._lanes.forget(name)
        return True

    def reserve(
        self, images: int, *, live: bool = False, client: Client = ANONYMOUS, runs: int = 1
    ) -> Reservation:
        """See :meth:`Reception.reserve`."""
        return self._reception.reserve(images, live=live, client=client, runs=runs)

    def submit(
        self, tasks: Listed[ImageTask], listener: Listener, client: Client = ANONYMOUS
    ) -> Submission:
        """See :meth:`Reception.submit`."""
        return self._reception.submit(tasks, listener, client)

    def check_memory(self, tasks: Listed[ImageTask]) -> None:
        """See :meth:`Reception.check_memory`."""
        self._reception.check_memory(tasks)

    def waiting(self) -> dict[Client, Amounts]:
        """See :meth:`Reception.waiting`."""
        return self._reception.waiting()

    def spent(self) -> dict[Client, float]:
        """Seconds of the device spent on each client's ordinary images; safe from any thread."""
        return dict(self._selection.turns.spent)

    def _check_open(self) -> None:
        if not self.ready or self._stop_at is not None:
            raise self._refusal("The server does not accept work now; it is starting or stopping.")

    def _refusal(self, otherwise: str) -> NotReady:
        """The error that says why work is no longer done."""
        if isinstance(self.failure, DeviceLost):
            return DeviceLost(self.failure.reason)
        if self.failure is not None:
            return NotReady("The engine failed; the server must be restarted.", retry_after_s=60)
        return NotReady(otherwise)

    def _run(self) -> None:
        try:
            with _current(self._device), torch.inference_mode():
                self._warm_up()
                while self._wait_for_work():
                    self._tick()
        except BaseException as error:
            log.critical("the engine failed", exc_info=error)
            self.failure = lost_device(error, self._device) or error
        finally:
            self.ready = False
            try:
                self._end_everything()
            except BaseException as error:
                log.critical("running work could not be ended", exc_info=error)
                self.failure = self.failure or error
            if self.failure is not None and self._on_failure is not None:
                self._on_failure()

    def _warm_up(self) -> None:
        max_rows = self._requested_budget or MAX_ROWS
        results: dict[str, WarmUpResult] = {}
        for name, model in self._models.items():
            result = results[name] = warm_up(model, max_rows, self._guessed_costs)
            self._reports.add(name, result.colors)
            self._costs.start(name, model.default_shape, result.cost)
        fixed: int | None = None
        if self._deterministic:
            fixed = self._requested_budget or common_fixed_rows(results.values())
            fixed = -(-fixed // FIXED_ROWS_MULTIPLE) * FIXED_ROWS_MULTIPLE
            self.measurements.fixed_rows = fixed
            log.info("deterministic: a forward pass has %d rows", fixed)
        for name, model in self._models.items():
            self._idle_work.add(model, results[name].cost, fixed or max_rows)
        if self._guessed_costs is None:
            self._idle_work.before_ready(self._models.values())
        self.measurements.row_budget = max_rows
        free_memory(self._device)
        self.ready = True
        log.info("ready; at most %d rows per forward pass", max_rows)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work, and prepare for it meanwhile; return False to end."""
        self._idle_work.until(self._wait, live=lambda: self._selection.expects_live)
        if self._stop_at is None:
            return True
        return bool(self._arrived or self._active) and monotonic() < self._stop_at

    def _wait(self, max_s: float | None) -> bool:
        """Wait for something to do, at most ``max_s`` seconds; return whether there is any."""
        with self._wake:
            return self._wake.wait_for(
                lambda: (
                    bool(self._arrived or self._active or self._chores) or self._stop_at is not None
                ),
                max_s,
            )

    def _interrupted(self, max_s: float) -> bool:
        """Wait at most ``max_s`` seconds for more newcomers or chores; return whether any came."""
        with self._wake:
            return self._wake.wait_for(
                lambda: len(self._arrived) > self._deferred or bool(self._chores), max_s
            )

    def _tick(self) -> None:
        self._chores.do()
        self._admit()
        chosen = self._selection.next_tick(self._active)
        if chosen:
            # Sizes share a pass if that costs less, so each is charged its part of the tick.
            parts = {sequence: sequence.work * sequence.lane.area for sequence in chosen}
            began = perf_counter()
            self._weave(chosen)
            self._selection.charge(parts, perf_counter() - began)
        else:
            self._report_and_count()
        recalled = self._recall()
        self._collect(self._decoder.work(idle=not (chosen or recalled)))
        live = self._selection.expects_live
        self._idle_work.beside_ticks(self._live_tick_s if live else MAX_PIECE_S)

    def _admit(self) -> None:
        """Admit newcomers, and drop cancelled images before any more work is done for them."""
        with self._wake:
            ordinary = ADMITTED_BESIDE_LIVE if self._selection.expects_live else ADMITTED_A_TICK
            self._selection.note_who_waits(chain(self._active, self._arrived))
            pictures, turns = TickPictures(), self._selection.turns
            newcomers = self._arrived.take(
                ADMITTED_A_TICK,
                ordinary,
                lambda one: pictures.take(one, due=turns.flow_due(one.flow, MAX_LEAD_S)),
            )
            self._deferred = len(self._arrived)
        self._active.extend(newcomers)
        cancelled = {sequence for sequence in self._active if sequence.submission.cancelled}
        for sequence in cancelled:
            if not sequence.done or self._decoder.drop(sequence):
                self._fail(sequence, Cancelled())
        began = perf_counter()
        staying = [sequence for sequence in newcomers if sequence not in cancelled]
        for sequence, error in self._not_admitted(staying):
            self._fail(sequence, error)
        if staying:
            seconds = perf_counter() - began
            self.measurements.encode_s += seconds
            self._selection.charge_side_work(pictures.parts(staying), seconds, self._active)
            for sequence in staying:
                self._reception.note_text_bytes(sequence)

    def _not_admitted(self, newcomers: list[Sequence]) -> list[tuple[Sequence, Exception]]:
        """Newcomers that cannot be made ready, after freeing recordings if memory was short."""
        failed = list(self._admission.admit(newcomers))
        short = [one for one, error in failed if is_out_of_memory(error) and one.slot < 0]
        if not short or not self._idle_work.release():
            return failed
        for one in short:
            one.submission.forget_shortage()
        others = [(one, error) for one, error in failed if one not in short]
        return [*others, *self._admission.admit(short)]

    def _weave(self, chosen: list[Sequence]) -> None:
        """Advance images by a stage, as far as possible."""
        for sequence in chosen:
            if not sequence.started_at:
                sequence.started_at = monotonic()
                self._reports.started(sequence)
        self._reports.last_stages([one for one in chosen if one.live and one.in_last_stage])
        for part in self._stages.run(chosen):
            if isinstance(part, Failure):
                for sequence in part.images:
                    self._fail(sequence, part.error)
                continue
            for outcome in part.outcomes:
                self._hear(outcome)
        if self._device.type == "cpu":
            # A CPU does no work of its own meanwhile, and its stages may take seconds.
            self._report_and_count()

    def _report_and_count(self) -> None:
        """Report progress and update the backlog, which need not keep the device waiting."""
        self._reports.report_steps()
        uncounted, self._uncounted = self._uncounted, set()
        with self._wake:
            for sequence in uncounted:
                if sequence.slot >= 0:
                    self._reception.count_rows(sequence)

    def _hear(self, outcome: Outcome) -> None:
        """Update the images of one lane after a stage that they have run."""
        closed: list[tuple[Sequence, int]] = []
        done: list[Sequence] = []
        for row, sequence in enumerate(outcome.batch.sequences):
            if not outcome.sound[row]:
                self._fail(sequence, outcome.broken(row))
                continue
            if sequence.closes_step:
                closed.append((sequence, row))
            sequence.count()
            sequence.settled |= outcome.settled[row]
            sequence.recollection.recalls = outcome.recalls[row] and sequence.may_recall
            if sequence.done:
                done.append(sequence)
            if not sequence.live:
                self._uncounted.add(sequence)
        self._reports.steps(closed, outcome.denoised)
        for sequence in done:
            sequence.denoised_at = monotonic()
        # Rows have an order of their own, which must not decide whose turn it is.
        self._decoder.add(sorted(done, key=lambda one: one.submitted_at))

    def _recall(self) -> set[Sequence]:
        """Run stages that need no row of a forward pass, for about as long as a fair tick takes.

        A run may recall nearly all of its stages at once, and newcomers would have to wait for
        that.

        Returns:
            The images that advanced; those that recall further stages do so in later ticks.
        """
        max_s = self._selection.max_side_work_s
        recalled: set[Sequence] = set()
        began = perf_counter()
        while (now := perf_counter()) - began < max_s and (
            recalling := self._selection.recalling(self._active)
        ):
            self._weave(recalling)
            seconds = perf_counter() - now
            recalled.update(recalling)
            self._selection.charge_side_work(dict.fromkeys(recalling, 1), seconds, self._active)
        return recalled

    def _meanwhile(self) -> None:
        """Do what the device need not wait for, while it works on a stage."""
        self._report_and_count()
        self._collect(self._decoder.finished())

    def _collect(self, outcomes: Iterable[tuple[Sequence, ImageResult | Exception]]) -> None:
        """Deliver what the decoder has finished, and charge its time."""
        before_s, live_before_s = self._decoder.seconds, self._decoder.live_s
        for sequence, outcome in outcomes:
            self._finish(sequence, outcome)
        self.measurements.decode_s = self._decoder.seconds
        seconds, live_s = self._decoder.seconds - before_s, self._decoder.live_s - live_before_s
        self._selection.share_out(self._active, seconds, live_s=live_s)

    def _finish(self, sequence: Sequence, outcome: ImageResult | Exception) -> None:
        """Deliver the result of an image whose last stage has run."""
        if isinstance(outcome, Exception):
            if is_out_of_memory(outcome):
                # Images of this size or larger are refused for a while.
                task, free = sequence.task, unused_bytes(self._device)
                self._overflows.note(task.model, task.width, task.height, None, free)
            self._fail(sequence, outcome)
            return
        # A listener that is notified of the last step may still cancel.
        self._reports.report_plain_steps()
        if not sequence.submission.finish():
            self._fail(sequence, Cancelled())
            return
        self.measurements.finished(sequence, outcome)
        if sequence.live:
            self._selection.note_live()
        self._leave(sequence)
        self._reports.finished(sequence, outcome)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if isinstance(error, Cancelled):
            self.measurements.cancelled += 1
        else:
            self.measurements.failed += 1
        if is_out_of_memory(error):
            error = OutOfMemory()
        sequence.submission.fail()
        self._leave(sequence)
        self._reports.failed(sequence, error)

    def _leave(self, sequence: Sequence) -> None:
        self._reports.report_plain_steps()
        self._uncounted.discard(sequence)
        if sequence.slot >= 0:
            sequence.lane.pool.release(sequence.slot)
            sequence.slot = -1
        self._active.remove(sequence)
        self._reception.release(sequence)

    def prepared(self, model: HostedModel) -> PreparedForwards:
        """What has been prepared for the forward passes of a hosted model; safe from any thread."""
        return self._idle_work.prepared(model)

    def tick_costs(self) -> list[tuple[str, tuple[int, int, int], TickCost]]:
        """Tick costs by model and latent shape; safe from any thread."""
        return self._costs.all()

    def _end_everything(self) -> None:
        with self._wake:
            # From here on nothing is accepted, whatever ended the loop.
            self._stop_at = self._stop_at or monotonic()
            self._active.extend(self._arrived.take_all())
        self._chores.refuse(self._refusal("The server is stopping."))
        for sequence in list(self._active):
            self._fail(sequence, self._refusal("The image was not finished: the server stopped."))


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the current device of this thread: events are recorded on its streams."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
