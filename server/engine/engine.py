"""The tick loop: admit, select, evaluate, guide, advance, retire."""

from __future__ import annotations

import logging
from bisect import bisect_right
from contextlib import contextmanager
from itertools import accumulate, chain
from math import ceil, inf
from threading import Condition, Lock, Thread
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from server.engine.backlog import Amounts, Bounds
from server.engine.capture import CudaRecorder
from server.engine.chores import Chores
from server.engine.client import ANYONE, Client
from server.engine.cost_model import MOST_ROWS, CostModel, TickCost
from server.engine.fair_queue import TURN_S, Turns
from server.engine.fair_tick import fair_tick
from server.engine.faults import attempt, free_memory, is_out_of_memory, lost_device
from server.engine.forwards import LONGEST_PIECE_S
from server.engine.live_share import ORDINARY_SHARE, Shares, share_tick
from server.engine.metrics import EngineMeasurements
from server.engine.preparation import AT_START, Preparation, Prepared
from server.engine.reception import Reception
from server.engine.row_watch import RowWatch
from server.engine.scheduler import (
    LONGEST_TICK_S,
    Candidate,
    LaneCosts,
    Load,
    in_time,
    rows_of_tick,
)
from server.engine.state.arrivals import Arrivals
from server.engine.state.lane import Lane, largest
from server.engine.state.overflows import Overflows
from server.engine.state.sequence import Sequence, units_of
from server.engine.state.submission import Submission
from server.engine.tick.decode import Decoder
from server.engine.tick.host_copy import HostCopy
from server.engine.tick.newcomers import Admission
from server.engine.tick.pictures import PicturesOfATick
from server.engine.tick.preview import fit_preview, previews
from server.engine.tick.stage import run_stage
from server.engine.warmup import Warmth, time_forwards, warm_up
from server.errors import Cancelled, DeviceLost, NotReady, RowFailed
from server.models.memory import unused_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Mapping
    from collections.abc import Sequence as Listed

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.reservation import Reservation
    from server.engine.state.sequence import Listener
    from server.engine.task import ImageTask
    from server.engine.tick.stage import Outcome, Stage
    from server.models.hosted import HostedModel

LaneKey: TypeAlias = "tuple[str, tuple[int, int, int], Hashable]"
"""Model, latent shape, and what else images of one forward have in common."""

StepsDone: TypeAlias = "tuple[Sequence, int]"
"""An image, and how many of its sampler steps are done."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)

LEAST_BUDGET = 2
"""Rows that an image with one branch needs at once."""

FIXED_ROWS_MULTIPLE = 8
"""At other batch sizes a CPU's kernels treat the last rows differently: at 5, 6 and 7 rows of the
embedded model the bits of a row depend on its place, at multiples of 4 they do not."""

ADMITTED_A_TICK = 16

ADMITTED_BESIDE_LIVE = 2
"""Ordinary images likewise while live frames are expected, which wait while these are encoded."""

FAIR_TICK_S = 0.1
"""Seconds of a tick beside images of other clients or sizes, which wait while it runs."""

FAIR_THROUGHPUT = 0.96
"""Share of the best throughput that such ticks reach, even if they take longer than that."""

LEAST_THROUGHPUT = 0.8
"""Share of the best that live ticks reach, even if they take longer than wished: where one row
alone takes that long, ticks of one row would only make all frames late."""

LIVE_PAUSE_S = 10.0
"""Seconds without a live frame after which none is expected."""

QUIET_S = 1.0
"""Seconds without work after which the engine prepares for what may come."""

PIECE_REST = 4
"""How many times as long as a piece of preparation between ticks the ticks run on before the next.
"""

LANES_KEPT = 8
"""Lanes kept for their next image though none is under way in them."""


class Engine:
    """Weaves the rows of all images under way through one forward a tick, in its own thread.

    Args:
        models: hosted models by name, at least one, all on one device. Others may be added and
            removed while it runs.
        row_budget: most rows of a forward, at least 2; what a tick has is chosen from what waits
            and from what ticks cost. In deterministic mode every forward has so many, and where
            None is given, as many as its cost recommends at the start.
        live_tick_s: most seconds of a tick while images of the priority live are under way, unless
            shorter ticks would cost a fifth of the throughput.
        deterministic: run everything at fixed batch shapes, so that an image's bits do not depend
            on what else is in the batch.
        max_pending: images waiting or under way; more are refused. Frames of live streams are
            counted by themselves.
        max_pending_s: seconds of the device that these images may need, as estimated.
        max_pending_bytes: bytes that they may need, likewise.
        on_failure: called in the engine's thread once it can never work again, when everybody has
            heard of it.
        guessed_costs: seconds of a tick by rows to begin with, which the ticks then correct. By
            default forwards are timed at the start, which takes longer than one image.
        prepares: run forwards at few numbers of rows, and all of these before they are needed:
            some at the start, the others while nothing waits. By default on a GPU; never in
            deterministic mode, where all forwards have the same number of rows.
        cuda_graphs: record the forwards that are prepared on a GPU, and replay them.
    """

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
    ) -> None:
        if row_budget is not None and row_budget < LEAST_BUDGET:
            raise ValueError(
                f"row_budget is {row_budget}; at least {LEAST_BUDGET} is needed for guidance."
            )
        self.ready = False
        self.failure: BaseException | None = None
        self.measurements = EngineMeasurements()
        self.row_watch = RowWatch()
        self._models = dict(models)
        self._asked_budget = row_budget
        self._deterministic = deterministic
        self._on_failure = on_failure
        self._guessed_costs = guessed_costs
        self._device = next(iter(models.values())).device
        self._live_tick_s = live_tick_s
        self._live_at = -inf
        self._shares = Shares()
        self._turns = Turns()
        self._costs = CostModel()
        on_gpu = self._device.type == "cuda"
        self._preparation: Preparation | None = None
        if (on_gpu if prepares is None else prepares) and not deterministic:
            records = on_gpu and cuda_graphs
            self._preparation = Preparation(_recorder_of if records else None)
        self._prepares_at = -inf
        self._undisturbed = Lock()
        self._fixed_rows: int | None = None
        self._overflows = Overflows()
        self._lanes: dict[LaneKey, Lane] = {}
        self._admission = Admission(self._models, self._lane_of, deterministic=deterministic)
        self._colours: dict[str, Tensor] = {}
        self._arrived = Arrivals()
        self._active: list[Sequence] = []
        self._decoder = Decoder(
            self._device, self._turns, self._give_back_memory, fixed=deterministic
        )
        self._previewed: list[tuple[list[StepsDone], HostCopy]] = []
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
            pace=lambda: ORDINARY_SHARE if self._expects_live else 1.0,
            check_open=self._check_open,
        )
        self._thread = Thread(target=self._run, name="weft-engine", daemon=True)

    def start(self) -> None:
        """Warm up and start to work, in the engine's own thread."""
        self._thread.start()

    def stop(self, timeout_s: float, last_tick_s: float | None = None) -> None:
        """Take no more work, give what is under way ``timeout_s`` seconds, then end the rest.

        Args:
            timeout_s: for what is under way.
            last_tick_s: most seconds to wait after that for a tick that nothing can interrupt;
                None waits until it ends.
        """
        with self._wake:
            self._stop_at = monotonic() + timeout_s
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(None if last_tick_s is None else timeout_s + last_tick_s)

    @property
    def device(self) -> torch.device:
        """Where all models are."""
        return self._device

    def add_model(self, model: HostedModel) -> None:
        """Serve one more model, on the same device, from the next tick on.

        The first forwards of the model run in the caller's thread, so that ticks go on meanwhile.
        They are only a few: its ticks teach the rest of what it costs.

        Args:
            model: loaded, under a name that none of the others has; the engine's from now on.

        Raises:
            MemoryError: not even one row of it fits in memory.
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        self._check_open()
        with torch.inference_mode():
            warmth = warm_up(model)
        self._in_own_thread(lambda: self._take_model(model, warmth))

    @contextmanager
    def undisturbed(self) -> Generator[None]:
        """Keep the engine from preparing for later work while another thread uses the device.

        A model that is loaded and memory that is given back would spoil a CUDA graph that is being
        recorded. Ticks go on.
        """
        with self._undisturbed:
            yield

    def release_recordings(self) -> bool:
        """Give back the memory of CUDA graphs, which are recorded again later; from any thread.

        Returns:
            Whether there were any.

        Raises:
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        return self._in_own_thread(self._let_go_of_recordings)

    def remove_model(self, name: str) -> bool:
        """Serve a model no longer, and let go of all that was made for it; from any thread.

        Returns:
            Whether it is removed; it stays while images of it are waiting or under way.

        Raises:
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        return self._in_own_thread(lambda: self._let_go_of_model(name))

    def _in_own_thread(self, work: Callable[[], Result]) -> Result:
        with self._wake:
            self._check_open()
            done = self._chores.ask(work)
        return done.result()

    def _take_model(self, model: HostedModel, warmth: Warmth) -> None:
        name = model.facts.name
        self._colours[name] = warmth.colours
        self._costs.start(name, self._default_shape(model), warmth.cost)
        if self._preparation is not None:
            most = self.measurements.row_budget
            self._preparation.add(model, self._default_shape(model), warmth.cost, most)
        self._admission.add(name, model)
        with self._wake:
            self._models[name] = model

    def _let_go_of_recordings(self) -> bool:
        released = self._preparation is not None and self._preparation.release()
        if released:
            free_memory(self._device)
        return released

    def _let_go_of_model(self, name: str) -> bool:
        # Those that wait to be shown hold their lane, and it the model.
        self._show_previews()
        with self._wake:
            if any(one.task.model == name for one in chain(self._arrived, self._active)):
                return False
            del self._models[name]
        del self._colours[name]
        self._costs.forget(name)
        self._admission.forget(name)
        self._overflows.forget()
        if self._preparation is not None:
            self._preparation.forget(name)
        self._lanes = {key: lane for key, lane in self._lanes.items() if key[0] != name}
        return True

    def reserve(self, images: int, *, live: bool = False, client: Client = ANYONE) -> Reservation:
        """See :meth:`Reception.reserve`."""
        return self._reception.reserve(images, live=live, client=client)

    def submit(
        self, tasks: Listed[ImageTask], listener: Listener, client: Client = ANYONE
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
        """Seconds of the device that each client's ordinary images had; safe from any thread."""
        return dict(self._turns.spent)

    def _check_open(self) -> None:
        if not self.ready or self._stop_at is not None:
            raise self._refusal("The server takes no work now; it is starting or stopping.")

    def _refusal(self, otherwise: str) -> NotReady:
        """Why nothing is done any more."""
        if isinstance(self.failure, DeviceLost):
            return DeviceLost(self.failure.reason)
        if self.failure is not None:
            return NotReady("The engine failed; the server must be restarted.", retry_after_s=60)
        return NotReady(otherwise)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
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
                log.critical("what was under way could not be ended", exc_info=error)
                self.failure = self.failure or error
            if self.failure is not None and self._on_failure is not None:
                self._on_failure()

    def _warm_up(self) -> None:
        most = self._asked_budget or MOST_ROWS
        for name, model in self._models.items():
            self._colours[name] = fit_preview(model)
            model.decode(torch.zeros(1, *self._default_shape(model), device=model.device))
            self._costs.start(name, self._default_shape(model), self._first_costs(name, most))
        if self._preparation is not None:
            self._prepare_first(self._preparation, most)
        if self._deterministic:
            asked = self._asked_budget or self._recommended_rows()
            self._fixed_rows = -(-asked // FIXED_ROWS_MULTIPLE) * FIXED_ROWS_MULTIPLE
            most = asked if self._asked_budget else self._fixed_rows
        self.measurements.row_budget = most
        free_memory(self._device)
        self.ready = True
        log.info("ready; at most %d rows per forward pass", most)

    def _first_costs(self, name: str, most: int) -> TickCost:
        if self._guessed_costs is not None:
            return TickCost(self._guessed_costs, guessed=True)
        samples = time_forwards(self._models[name], most)
        log.info("%s: ms per forward pass, by rows: %s", name, _milliseconds(samples))
        return TickCost(samples)

    def _prepare_first(self, preparation: Preparation, most: int) -> None:
        """What runs before the server is ready: all but the large forwards."""
        for name, model in self._models.items():
            shape = self._default_shape(model)
            preparation.add(model, shape, self._costs.of(name, shape), most)
        if self._guessed_costs is None:
            while piece := preparation.next(AT_START):
                self._prepare(piece)
        for name, model in self._models.items():
            sizes = ", ".join(map(str, self.prepared(model).rows)) or "not yet known numbers of"
            log.info("%s: forward passes are filled up to %s rows", name, sizes)

    def _recommended_rows(self) -> int:
        """Rows of every forward in deterministic mode, which none of the models finds too many."""
        long_queue = Load(lane=0, rows=8 * MOST_ROWS, widest=1, live=False)
        costs = [self._costs.of(n, self._default_shape(m)) for n, m in self._models.items()]
        return min(
            rows_of_tick(long_queue, MOST_ROWS, cost.seconds, LONGEST_TICK_S, tick=1)
            for cost in costs
        )

    def _default_shape(self, model: HostedModel) -> tuple[int, int, int]:
        return model.latent_shape(model.facts.default_width, model.facts.default_height)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work, and prepare for it meanwhile; False when it is time to end."""
        quiet_s: float | None = QUIET_S
        while not self._wait(quiet_s):
            quiet_s = self._prepare_next()
        if self._stop_at is None:
            return True
        return bool(self._arrived or self._active) and monotonic() < self._stop_at

    def _wait(self, most_s: float | None) -> bool:
        """Whether there is something to do, at the latest after so many seconds."""
        with self._wake:
            return self._wake.wait_for(
                lambda: (
                    bool(self._arrived or self._active or self._chores) or self._stop_at is not None
                ),
                most_s,
            )

    def _prepare_next(self) -> float | None:
        """Make one piece of the preparation; how long to wait for other work before the next one.

        Live streams have pauses between their frames that are shorter than a piece.
        """
        if self._expects_live:
            return QUIET_S
        if not self._undisturbed.acquire(blocking=False):
            return QUIET_S
        try:
            piece = None if self._preparation is None else self._preparation.next()
            if piece is None:
                return None
            self._prepare(piece)
            return 0.0
        finally:
            self._undisturbed.release()

    def _prepare_beside_ticks(self) -> None:
        """Make a small piece of the preparation where there are no quiet moments."""
        if self._preparation is None or monotonic() < self._prepares_at:
            return
        most_s = self._live_tick_s if self._expects_live else LONGEST_PIECE_S
        piece = self._preparation.next_beside_ticks(most_s)
        if piece is None or not self._undisturbed.acquire(blocking=False):
            return
        began = monotonic()
        try:
            self._prepare(piece)
        finally:
            self._undisturbed.release()
        self._prepares_at = monotonic() + PIECE_REST * (monotonic() - began)

    def _prepare(self, piece: Callable[[], object]) -> None:
        failed = attempt(piece, self._device)
        if isinstance(failed, Exception):
            log.warning("what was tried before it was needed failed", exc_info=failed)
            free_memory(self._device)

    def _tick(self) -> None:
        self._chores.do()
        self._admit()
        chosen = self._select()
        if chosen:
            # Sizes that share a forward do so as it costs less: each has its part of what is saved.
            parts = {sequence: sequence.work * sequence.lane.area for sequence in chosen}
            began = perf_counter()
            self._weave(chosen)
            self._charge(parts, perf_counter() - began)
        recalled = self._recall()
        if chosen or recalled:
            with self._wake:
                for sequence in {*chosen, *recalled}:
                    if not sequence.live and sequence.slot >= 0:
                        self._reception.count_rows(sequence)
        self._collect(idle=not (chosen or recalled))
        self._prepare_beside_ticks()

    def _admit(self) -> None:
        """Take in newcomers, and let go of what was cancelled, before any work is done for it."""
        with self._wake:
            ordinary = ADMITTED_BESIDE_LIVE if self._expects_live else ADMITTED_A_TICK
            self._note_who_waits()
            pictures = PicturesOfATick()
            newcomers = self._arrived.take(
                ADMITTED_A_TICK,
                ordinary,
                lambda one: pictures.take(one, due=self._turns.flow_due(one.flow, TURN_S)),
            )
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
            live = sum(sequence.live for sequence in staying) / len(staying)
            self._share_out(live_s=live * seconds, ordinary_s=(1 - live) * seconds)
            self._charge(pictures.parts(staying), seconds)
            for sequence in staying:
                self._reception.note_told(sequence)

    def _not_admitted(self, newcomers: list[Sequence]) -> list[tuple[Sequence, Exception]]:
        """Newcomers that cannot be made ready, none of them for memory that recordings have."""
        failed = list(self._admission.admit(newcomers))
        short = [one for one, error in failed if is_out_of_memory(error) and one.slot < 0]
        if not short or not self._let_go_of_recordings():
            return failed
        for one in short:
            one.submission.forget_shortage()
        others = [(one, error) for one, error in failed if one not in short]
        return [*others, *self._admission.admit(short)]

    def _note_who_waits(self) -> None:
        """Tell of the flows that have a turn; batch work has none while other images are to run.

        Else its client would seem to be served least for as long as it may not be served, and
        whatever goes by turns would wait for it.
        """
        ordinary = [one for one in (*self._active, *self._arrived) if not one.live]
        now = monotonic()
        running = [one for one in ordinary if not one.done]
        first = [one for one in running if in_time(one.priority, now - one.submitted_at)]
        done = [one for one in ordinary if one.done]
        self._turns.wait({one.flow for one in chain(done, first or running)}, now)

    def _charge(self, parts: Mapping[Sequence, float], seconds: float) -> None:
        """Count seconds of the device as had by the clients of some images, by their parts."""
        for sequence, part in parts.items():
            if not sequence.live:
                self._turns.charge(sequence.flow, seconds * part / sum(parts.values()))

    def _select(self) -> list[Sequence]:
        running = [one for one in self._active if not (one.done or one.recalls)]
        lanes = {id(sequence.lane): sequence.lane for sequence in running}
        live = any(sequence.live for sequence in running)
        costs = {key: self._costs_of(lane, live=live) for key, lane in lanes.items()}
        prices = {key: cost.seconds_a_row for key, cost in costs.items()}
        now = monotonic()
        candidates = [
            Candidate(
                rows=s.rows,
                remaining=s.remaining * prices[id(s.lane)],
                age=now - s.submitted_at,
                priority=s.priority,
                lane=id(s.lane),
                group=None if s.task.group is None else id(s.task.group),
                stream=s.stream,
                flow=s.flow,
            )
            for s in running
        ]

        def rows_of(load: Load) -> int:
            return self.rows_of_tick(load, lanes[load.lane])

        if live:
            self._live_at = now
            choice = share_tick(candidates, self._shares, self._turns, costs, rows_of)
            self._shares = choice.shares
            chosen = choice.chosen
        else:
            chosen = fair_tick(candidates, self._turns, costs, rows_of)
        # Oldest first, whoever's turn it is: rows keep their order from tick to tick, and with it
        # what is kept for the adapters of these rows.
        return [running[i] for i in sorted(chosen)]

    def rows_of_tick(self, load: Load, lane: Lane) -> int:
        """How many rows the next tick has, in the engine's thread."""
        costs = self._costs_of(lane, live=load.live)
        if self._fixed_rows is not None:
            return costs.most
        ticks = self.measurements.ticks
        return rows_of_tick(load, costs.most, costs.seconds, costs.longest_s, ticks)

    def _costs_of(self, lane: Lane, *, live: bool) -> LaneCosts:
        cost, fixed = lane.cost, self._fixed_rows
        most = min(self.measurements.row_budget, lane.row_cap.rows)
        if live:
            longest_s = max(self._live_tick_s, cost.seconds_at(LEAST_THROUGHPUT, most))
        else:
            longest_s = self._longest_ordinary_s(cost, most)

        def seconds(rows: int) -> float:
            return cost.seconds(fixed or lane.size_of(rows))

        return LaneCosts(most, seconds, longest_s, lane.area, lane.mixes)

    def _longest_ordinary_s(self, cost: TickCost, most: int) -> float:
        """Whoever comes during a tick waits for its end."""
        if self._expects_live:
            # A live frame waits for no longer than there was none.
            return min(self._live_tick_s, monotonic() - self._live_at)
        if self._turns.contended:
            fair_s = max(FAIR_TICK_S, cost.seconds_at(FAIR_THROUGHPUT, most))
            return min(LONGEST_TICK_S, fair_s)
        return LONGEST_TICK_S

    @property
    def _expects_live(self) -> bool:
        return monotonic() - self._live_at < LIVE_PAUSE_S

    def _share_out(self, *, live_s: float, ordinary_s: float) -> None:
        """Count work beside the ticks towards the shares of live and ordinary images."""
        if self._expects_live and not all(sequence.live for sequence in self._active):
            self._shares = self._shares.after(live_s=live_s, ordinary_s=ordinary_s)

    def _weave(self, chosen: list[Sequence]) -> None:
        """Run a stage of the chosen; halve them on an error until it is one image's or group's."""
        for sequence in chosen:
            if not sequence.started_at:
                sequence.started_at = monotonic()
                self._tell(sequence, sequence.listener.started, sequence.index)
        stage = attempt(lambda: self._stage(chosen), self._device)
        if isinstance(stage, Exception):
            self._divide(chosen, stage)
            return
        self._show_previews()
        for outcome in stage.outcomes:
            self._hear(outcome)

    def _hear(self, outcome: Outcome) -> None:
        """Take the images of one lane on by the stage that they have run."""
        sound: list[tuple[Sequence, int]] = []
        for row, sequence in enumerate(outcome.batch.sequences):
            if outcome.sound[row]:
                sound.append((sequence, row))
            else:
                self._fail(sequence, RowFailed(_broken(sequence)))
        self._report(sound, outcome.denoised)
        for sequence, row in sound:
            sequence.settled |= outcome.settled[row]
            sequence.recollection.recalls = outcome.recalls[row] and sequence.may_recall
        self._retire([sequence for sequence, _ in sound if sequence.done])

    def _divide(self, chosen: list[Sequence], error: Exception) -> None:
        """Run the two halves of what together is an error; one image or group fails by it."""
        units = units_of(chosen)
        if is_out_of_memory(error):
            lane, rows = largest(one.lane for one in chosen), sum(one.rows for one in chosen)
            filled_up = lane.size_of(rows) > rows
            lane.row_cap.overflow(rows)
            released = self._give_back_memory()
            if len(units) == 1 and (filled_up or released):
                # Recordings, or rows that nobody reads, took the room. Now there are none.
                self._weave(chosen)
                return
        if len(units) == 1:
            log.error("an image failed in its stage", exc_info=error)
            # What ControlNets took is no reason to refuse as many rows without.
            self._note_overflow(chosen[0], error, ceil(sum(one.work for one in chosen)))
            for sequence in chosen:
                self._fail(sequence, error)
            return
        half = len(units) // 2
        self._weave([*chain(*units[:half])])
        self._weave([*chain(*units[half:])])

    def _recall(self) -> set[Sequence]:
        """Run stages that need no row of a forward, for about as long as a fair tick takes.

        A run may recall nearly all of its stages at once, which whoever comes would wait for.

        Returns:
            The images that went on; those that recall further stages do so in later ticks.
        """
        longest_s = ORDINARY_SHARE * self._live_tick_s if self._expects_live else FAIR_TICK_S
        recalled: set[Sequence] = set()
        began = perf_counter()
        while (now := perf_counter()) - began < longest_s and (recalling := self._recalling()):
            self._weave(recalling)
            seconds = perf_counter() - now
            recalled.update(recalling)
            self._charge(dict.fromkeys(recalling, 1), seconds)
            live = sum(one.live for one in recalling) / len(recalling)
            self._share_out(live_s=live * seconds, ordinary_s=(1 - live) * seconds)
        return recalled

    def _recalling(self) -> list[Sequence]:
        """Images whose next stages are recalled at once, as many as a tick may have rows."""
        waiting = [one for one in self._active if one.recalls]
        waiting.sort(key=lambda one: (not one.live, self._turns.standing(one.flow)))
        most = min([self.measurements.row_budget, *(one.lane.row_cap.rows for one in waiting)])
        fitting = bisect_right([*accumulate(one.rows for one in waiting)], most)
        return waiting[: max(1, fitting)]

    def _give_back_memory(self) -> bool:
        """Free what can be done without; whether that were recordings of forwards."""
        released = self._preparation is not None and self._preparation.release()
        free_memory(self._device)
        return released

    def _stage(self, chosen: list[Sequence]) -> Stage:
        lanes, m = {sequence.lane for sequence in chosen}, self.measurements
        rows = sum(sequence.rows for sequence in chosen)
        work = sum(sequence.work for sequence in chosen)
        widest = largest(lanes)
        size = self._fixed_rows or widest.size_of(rows)
        known = widest.sizes_known
        stage = run_stage(chosen, self._fixed_rows)
        if chosen[0].recalls:
            m.weave_s += stage.seconds
            return stage
        m.ticks += 1
        m.rows_per_tick[rows] += 1
        m.evaluations += rows
        m.denoise_s += stage.denoise_s
        m.weave_s += stage.seconds - stage.denoise_s
        if widest.sizes_known == known:
            # The first forward of a size tells nothing of those after it, and what ControlNets
            # took of this one is no part of others.
            moved = widest.cost.observe(size, stage.seconds * rows / work)
            # Sizes that mostly come along follow the machine's pace by larger ones. They do so at
            # all ticks of these: what is seen at mixed ones alone, which take longer than others,
            # would add up from one to the next.
            for lane in self._lanes.values():
                if lane.mixes_with(widest) and lane.area < widest.area:
                    lane.cost.shift(moved)
        widest.row_cap.fit(rows)
        self.row_watch.see(stage.batches, m.ticks, stage.seconds, m.pending)
        return stage

    def _report(self, images: list[tuple[Sequence, int]], denoised: Tensor) -> None:
        """Tell of the steps that this stage closed.

        Args:
            images: each with its row of the predictions.
            denoised: the predictions, ``[rows, C, h, w]``.
        """
        wanted: list[StepsDone] = []
        rows: list[int] = []
        for sequence, row in images:
            closes, plan = sequence.closes_step, sequence.task.plan
            sequence.count()
            if not closes:
                continue
            progress = sequence, plan.step[sequence.stage - 1] + 1
            if sequence.task.previews and not sequence.done:
                wanted.append(progress)
                rows.append(row)
            else:
                self._tell_progress(progress, None)
        if wanted:
            self._preview(wanted, denoised, rows)

    def _preview(self, wanted: list[StepsDone], denoised: Tensor, rows: list[int]) -> None:
        """Start the previews of a tick; on a GPU they are there with the next tick's wait."""
        lane, colours = wanted[0][0].lane, self._colours[wanted[0][0].task.model]
        made = attempt(
            lambda: HostCopy(previews(denoised.index_select(0, lane.indices(rows)), colours)),
            self._device,
        )
        if isinstance(made, Exception):
            log.warning("previews failed", exc_info=made)
            for progress in wanted:
                self._tell_progress(progress, None)
            return
        self._previewed.append((wanted, made))
        if made.ready:
            self._show_previews()

    def _show_previews(self) -> None:
        previewed, self._previewed = self._previewed, []
        for wanted, copy in previewed:
            fetched = attempt(copy.fetch, self._device)
            failed = isinstance(fetched, Exception)
            pictures = [None] * len(wanted) if failed else fetched[0].numpy()
            for progress, picture in zip(wanted, pictures, strict=True):
                self._tell_progress(progress, picture)

    def _tell_progress(self, progress: StepsDone, picture: NDArray[np.uint8] | None) -> None:
        sequence, step = progress
        if sequence.slot >= 0:
            told = sequence.index, step, sequence.task.plan.steps, picture
            self._tell(sequence, sequence.listener.progress, *told)

    def _retire(self, done: list[Sequence]) -> None:
        for sequence in done:
            sequence.denoised_at = monotonic()
        self._decoder.add(done)

    def _collect(self, *, idle: bool) -> None:
        """Let the decoder work, and send what it has finished."""
        before_s, live_before_s = self._decoder.seconds, self._decoder.live_s
        for sequence, outcome in self._decoder.work(idle=idle):
            if isinstance(outcome, Exception):
                self._note_overflow(sequence, outcome)
                self._fail(sequence, outcome)
                continue
            if not sequence.submission.finish():
                self._fail(sequence, Cancelled())
                continue
            self.measurements.finished(
                sequence.task.priority,
                monotonic() - sequence.submitted_at,
                {
                    "queue": outcome.queue_s,
                    "denoise": outcome.denoise_s,
                    "decode": outcome.decode_s,
                },
            )
            if sequence.live:
                self._live_at = monotonic()
            if sequence.saved:
                self.measurements.saved[sequence.task.policy.name] += sequence.saved
            if sequence.task.cache is not None:
                self.measurements.saved[sequence.task.cache.name] += sequence.recollection.saved
            self._leave(sequence)
            self._tell(sequence, sequence.listener.finished, sequence.index, outcome)
        self.measurements.decode_s = self._decoder.seconds
        live_s = self._decoder.live_s - live_before_s
        self._share_out(live_s=live_s, ordinary_s=self._decoder.seconds - before_s - live_s)

    def _note_overflow(self, sequence: Sequence, error: Exception, rows: int | None = None) -> None:
        """Remember what did not fit into memory by itself, so that as much is refused at once."""
        if is_out_of_memory(error):
            task, free = sequence.task, unused_bytes(self._device)
            self._overflows.note(task.model, task.width, task.height, rows, free)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if isinstance(error, Cancelled):
            self.measurements.cancelled += 1
        else:
            self.measurements.failed += 1
        if is_out_of_memory(error):
            error = RowFailed(
                "There was not enough memory for this image; ask for a smaller width or height."
            )
        sequence.submission.fail()
        self._leave(sequence)
        self._tell(sequence, sequence.listener.failed, sequence.index, error)

    def _tell(self, sequence: Sequence, call: Callable[..., None], *said: Any) -> None:
        try:
            call(*said)
        except Exception:
            log.exception("a listener failed; its images are cancelled")
            sequence.submission.cancel()

    def _leave(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            sequence.lane.pool.give_back(sequence.slot)
            sequence.slot = -1
        self._active.remove(sequence)
        self._reception.see_off(sequence)

    def prepared(self, model: HostedModel) -> Prepared:
        """What has been done for the forwards of a hosted model; safe from any thread."""
        if self._preparation is None:
            return Prepared()
        return self._preparation.of(model.facts.name, self._default_shape(model))

    def tick_costs(self) -> list[tuple[str, tuple[int, int, int], TickCost]]:
        """What ticks cost by model and latent shape; safe from any thread."""
        return self._costs.all()

    def _lane_of(self, task: ImageTask, length: int) -> Lane:
        model = self._models[task.model]
        shape = model.latent_shape(task.width, task.height)
        group = model.group_key(task.width, task.height, length)
        key = task.model, shape, group
        if key not in self._lanes:
            self._forget_idle_lanes()
            cost = self._costs.keep(task.model, shape)
            most, forwards = self.measurements.row_budget, None
            if self._preparation is not None:
                forwards = self._preparation.forwards(model, shape, cost, most)
            # Another shape of a forward may sum in another order.
            mixes = model.mixes_sizes and not self._deterministic
            mixed = (task.model, group) if mixes else None
            self._lanes[key] = Lane(model, shape, cost, most, forwards, mixed)
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
            self._active.extend(self._arrived.take_all())
        self._chores.refuse(self._refusal("The server is stopping."))
        for sequence in list(self._active):
            self._fail(sequence, self._refusal("The image was not finished: the server stopped."))


def _recorder_of(model: HostedModel) -> CudaRecorder:
    return CudaRecorder(model.device)


def _milliseconds(samples: Mapping[int, float]) -> str:
    return ", ".join(f"{rows}: {1000 * seconds:.1f}" for rows, seconds in samples.items())


def _broken(sequence: Sequence) -> str:
    step = sequence.task.plan.step[sequence.stage] + 1
    return (
        f"The image became NaN or infinite at step {step} of {sequence.task.plan.steps}; "
        "a lower guidance scale or another sampler may help."
    )
