"""CUDA graphs: forward passes that a GPU replays without launching each kernel from Python.

Below about 12 rows a GPU waits for kernel launches: a U-Net has some thousand kernels, and Python
takes longer to launch them than an H100 takes to run them. A graph launches all of them at once.

A forward pass is recorded while nothing waits or, if there is always something waiting, in pieces
between ticks once it has run often; until then it runs eagerly. A recording holds for one shape
(rows, latents and conditioning) and for one form of what the rows change inside the network, such
as one combination of adapters. There are many forms, so one is recorded only after it has run a few
times, and a recording is dropped as soon as something that it reads no longer exists.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch

from server.engine.faults import free_memory, is_out_of_memory, lost_device
from server.engine.unrepeatable import unrepeatable
from server.models.inputs_form import StaleInputs, form_of, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

__all__ = ["Cost", "Form", "Graphs", "Recorder", "Replay", "worth_recording"]

log = logging.getLogger(__name__)

MAX_REPLAY_RATIO = 0.95
"""Maximum time of a replayed pass, relative to an eager one, for a recording to be kept."""

TIMED = 3
"""Number of eager and of replayed passes that are timed; the fastest of each counts."""

CLOSE = 0.01
"""Maximum deviation of a recording from its forward pass, relative to the largest number.

They are bit-identical where libraries choose the same kernels; an error in a recording is large.
"""

BUSY_THRESHOLD = 40
"""Number of passes of a shape after which it is recorded although something waits.

A recording takes about 10 passes, and a replay saves at least half of a pass of few rows. So twice
the cost of the recording has been lost by then, and at most a quarter is added if nothing is saved.
"""

IDLE_THRESHOLD = 5
"""Number of passes of a shape and form until it is recorded in a quiet moment, unless plain."""

MAX_FAILURES = 2
"""Number of failed recordings after which passes of a kind run eagerly for good.

A capture also fails if another thread waits for the whole device meanwhile.
"""

PIECE_FORWARDS = 3
"""Number of forward passes in the longest piece of a recording: one that is watched operation by
operation, or two and a replay."""

MAX_CANDIDATES = 16
WANTED_BYTES = 2**28
"""Bounds on the passes kept until they are recorded; the hints of ControlNets are large."""

MAX_GRAPHS = 64

PAUSE_AFTER_SHORTAGE_S = 300.0
"""Seconds after a shortage of memory during which nothing is recorded."""

ForwardInputs: TypeAlias = "Mapping[str, Tensor]"
"""Tensors of a forward pass by name: x and t, then all of its inputs."""


class Replay(Protocol):
    """A recording of a forward pass."""

    def __call__(self, *given: Tensor) -> Tensor:
        """Replay the pass for other tensors of the same shapes."""
        ...

    def release(self) -> None:
        """Free its memory."""
        ...


class Recorder(Protocol):
    """Makes the recordings of one model."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the recordings hold."""
        ...

    def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
        """Whether a recording of a pass takes at most ``room`` bytes more; may run the pass."""
        ...

    def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> Replay:
        """Record a function of tensors like the given ones."""
        ...

    def reset_pool(self) -> None:
        """Note that no recording is left."""
        ...


class Cost(Protocol):
    """Seconds of a network's calls, by number of rows."""

    def seconds(self, rows: int) -> float:
        """Return the expected seconds of a call with a number of rows."""
        ...

    def correct(self, rows: int, seconds: float) -> None:
        """Expect these seconds of calls with this number of rows from now on."""
        ...


class Form(Protocol):
    """The non-tensor part of a call of a network; equal for calls that one recording can serve."""

    @property
    def subject(self) -> str:
        """Name of the network that is called."""
        ...

    @property
    def alive(self) -> bool:
        """Whether all that it refers to still exists."""
        ...

    @property
    def kind(self) -> str:
        """The non-tensor inputs of rows in a few words; empty for plain rows."""
        ...

    def evaluate(self, model: HostedModel, tensors: ForwardInputs) -> Tensor:
        """Make a call of this form with other tensors."""
        ...


class Shape(NamedTuple):
    """Everything that a recording of a forward pass is specific to.

    Attributes:
        rows: number of rows.
        others: name, shape without the rows, and dtype of each tensor.
        form: form of the call: everything except its tensors.
    """

    rows: int
    others: tuple[tuple[str, torch.Size, torch.dtype], ...]
    form: Form

    @property
    def kind(self) -> Hashable:
        """Key of passes of which either all can be recorded, or none."""
        return self.others, self.form.subject, self.form.kind


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """A forward pass that ran without a recording.

    Attributes:
        given: tensors of the latest run.
        cost: cost of ticks, which is corrected once the pass is replayed.
        runs: number of runs so far.
    """

    given: ForwardInputs
    cost: Cost
    runs: int

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.nbytes for one in self.given.values())


class Graphs:
    """The recordings of one model's forward passes, which share their memory.

    Args:
        model: model of the forward passes.
        recorder: recorder that makes them.
        room: function that returns the bytes that recordings may take in addition to what they
            hold.
        exact: whether recordings must equal their passes bit for bit.
        within: context in which recordings are made and compared: that of the stream on which they
            are replayed, if it is not the current one, since they share memory.
    """

    def __init__(
        self,
        model: HostedModel,
        recorder: Recorder,
        room: Callable[[], float] = lambda: inf,
        *,
        exact: bool = False,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model = model
        self._within = within
        self._recorder = recorder
        self._room = room
        self._close = 0.0 if exact else CLOSE
        self._recorded: dict[Shape, Replay] = {}
        self._wanted: dict[Shape, _Wanted] = {}
        self._under_way: tuple[Shape, Generator[None]] | None = None
        self._repeatable: dict[Hashable, bool] = {}
        self._ends: dict[Hashable, int] = {}
        self._failures: Counter[Hashable] = Counter()
        self._paused_until = -inf
        self._generation = 0
        # On its first use torch imports modules for seconds, which no image should wait for.
        unrepeatable(lambda: torch.empty(1), torch.device("cpu"))

    @property
    def rows(self) -> list[int]:
        """Numbers of rows that are recorded, in ascending order."""
        return sorted({shape.rows for shape in list(self._recorded)})

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the recordings hold."""
        return self._recorder.nbytes

    @property
    def wanted(self) -> bool:
        """Whether a forward pass should be recorded, or is being recorded."""
        return self._under_way is not None or bool(self._ripe())

    def due(self, max_s: float) -> bool:
        """Whether to record the next piece although something waits.

        Args:
            max_s: maximum seconds of a piece.
        """
        return self._under_way is not None or self._often(max_s) is not None

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs, cost: Cost) -> Tensor:
        """See ``HostedModel.evaluate``.

        Args:
            x: latents of all rows.
            t: noise levels of all rows, as given to the network.
            inputs: inputs of all rows.
            cost: cost of the ticks, which is corrected if this pass is recorded.
        """
        inputs = self._model.in_tensors(inputs)
        self._drop_dead()
        form = form_of(inputs)
        if form is None or not form.alive:
            return self._model.evaluate(x, t, inputs)
        if self._model.blocks is not None and self._model.blocks.generation != self._generation:
            self._generation = self._model.blocks.generation
            self._forget()
            self._wanted, self._repeatable, self._ends = {}, {}, {}
            self._failures.clear()
        recorded = self.replayed({"x": x, "t": t} | tensors_of(inputs), form, cost)
        return self._model.evaluate(x, t, inputs) if recorded is None else recorded

    def replayed(self, given: ForwardInputs, form: Form, cost: Cost) -> Tensor | None:
        """Replay a call if it is recorded; else return None, and note that it may be recorded.

        Args:
            given: tensors of the call; "x" has one entry for each of its rows.
            form: form of the call: everything except its tensors.
            cost: cost of such calls, which is corrected if this one is recorded.
        """
        shape = shape_of(given, form)
        recorded = self._recorded.pop(shape, None)
        if recorded is not None:
            # Last in order: the least recently replayed one is dropped first.
            self._recorded[shape] = recorded
            return recorded(*given.values())
        if self._may_be_recorded(shape):
            before = self._wanted.pop(shape, None)
            runs = 1 if before is None else before.runs + 1
            self._wanted[shape] = _Wanted(given, cost, runs)
            self._keep_latest()
        return None

    def _keep_latest(self) -> None:
        """Drop passes that have not run again for the longest time, if too many are kept."""
        held = sum(one.nbytes for one in self._wanted.values())
        while len(self._wanted) > MAX_CANDIDATES or (held > WANTED_BYTES and len(self._wanted) > 1):
            held -= self._wanted.pop(next(iter(self._wanted))).nbytes

    def record(self) -> None:
        """Record the smallest pass that is wanted, while nothing else waits for the device.

        Raises:
            Exception: the device is lost.
        """
        self._drop_dead()
        ripe = [] if self._under_way else self._ripe()
        self._advance(min(ripe, key=lambda one: one.rows) if ripe else None)
        while self._under_way is not None:
            self._advance(None)

    def record_piece(self, max_s: float) -> None:
        """Record a piece of a pass that is :meth:`due`, between two ticks.

        Raises:
            Exception: the device is lost.
        """
        self._drop_dead()
        self._advance(None if self._under_way else self._often(max_s))

    def release(self) -> bool:
        """Free all memory, and record nothing for a while.

        Returns:
            Whether there was anything to free.
        """
        held = bool(self._recorded or self._wanted or self._under_way)
        self._forget()
        self._rest()
        return held

    def _forget(self) -> None:
        """Drop all recordings."""
        self._stop()
        for one in self._recorded.values():
            one.release()
        self._recorded = {}
        self._recorder.reset_pool()

    def _stop(self) -> None:
        """Abandon the recording under way."""
        if self._under_way is not None:
            _, pieces = self._under_way
            self._under_way = None
            pieces.close()

    def _drop_dead(self) -> None:
        """Drop passes and recordings that can never run again, as something they read is gone."""
        gone = self._under_way is not None and not self._under_way[0].form.alive
        if gone:
            self._stop()
        self._wanted = {shape: one for shape, one in self._wanted.items() if shape.form.alive}
        dead = [shape for shape in self._recorded if not shape.form.alive]
        for shape in dead:
            self._recorded.pop(shape).release()
        if gone or dead:
            self._return_memory()

    def _ripe(self) -> list[Shape]:
        """Passes that are worth recording in a quiet moment."""
        wanted = list(self._wanted.items())
        return [shape for shape, one in wanted if not shape.form.kind or one.runs >= IDLE_THRESHOLD]

    def _often(self, max_s: float) -> Shape | None:
        """The pass that has run most often, of those that are worth recording between ticks.

        A pass whose seconds are unknown is timed first, which takes no longer than the pass has
        taken between ticks as often.
        """
        often = {
            shape: one.runs
            for shape, one in self._wanted.items()
            if worth_recording(one.runs, one.cost.seconds(shape.rows), max_s)
            or (one.runs >= BUSY_THRESHOLD and one.cost.seconds(shape.rows) == inf)
        }
        return max(often, key=lambda shape: often[shape]) if often else None

    def _advance(self, shape: Shape | None) -> None:
        """Continue the recording under way, or begin that of a shape."""
        if shape is not None:
            self._under_way = shape, self._pieces(shape, self._wanted.pop(shape))
        if self._under_way is None:
            return
        _, pieces = self._under_way
        try:
            with self._within():
                next(pieces)
        except StopIteration:
            self._under_way = None
            self._return_memory()

    def _pieces(self, shape: Shape, wanted: _Wanted) -> Generator[None]:
        if not self._may_be_recorded(shape):
            return
        try:
            yield from self._record(shape, wanted)
        except StaleInputs:
            return
        except Exception as error:
            if lost_device(error, self._model.device):
                raise
            if is_out_of_memory(error):
                self._under_way = None
                self.release()
                return
            self._failures[shape.kind] += 1
            if self._failures[shape.kind] == MAX_FAILURES:
                self._give_up(shape, "recording it failed", error)

    def _rest(self) -> None:
        self._wanted = {}
        self._paused_until = monotonic() + PAUSE_AFTER_SHORTAGE_S

    def _may_be_recorded(self, shape: Shape) -> bool:
        if monotonic() < self._paused_until or not self._repeatable.get(shape.kind, True):
            return False
        return shape.rows < self._ends.get(shape.kind, inf)

    def _record(self, shape: Shape, wanted: _Wanted) -> Generator[None]:
        evaluate, tensors = self._of_tensors(shape), [*wanted.given.values()]
        if wanted.cost.seconds(shape.rows) == inf:
            wanted.cost.correct(shape.rows, _seconds(lambda: evaluate(*tensors)))
            self._wanted[shape] = wanted
            return
        if shape.kind not in self._repeatable:
            obstacle = unrepeatable(lambda: evaluate(*tensors), tensors[0].device)
            self._repeatable[shape.kind] = obstacle is None
            if obstacle is not None:
                self._give_up(shape, obstacle, None)
                return
            yield
        if not self._recorder.fits(lambda: evaluate(*tensors), self._room()):
            log.info("%s: no memory for more CUDA graphs", self._model.facts.name)
            self._rest()
            return
        # In the same piece: passes of other sizes could evict what this one has cached, and a
        # capture cannot copy it from the host again.
        made = self._recorder.record(evaluate, tensors)
        try:
            yield
            if not (yield from self._gives_the_same(shape, made, evaluate, tensors)):
                return
            plain_s = seconds = inf
            for _ in range(TIMED):
                plain_s = min(plain_s, _seconds(lambda: evaluate(*tensors)))
                seconds = min(seconds, _seconds(lambda: made(*tensors)))
                yield
            if seconds > MAX_REPLAY_RATIO * plain_s:
                self._ends[shape.kind] = shape.rows
                return
            self._keep(shape, made)
        finally:
            if self._recorded.get(shape) is not made:
                made.release()
        if not shape.form.kind:
            wanted.cost.correct(shape.rows, seconds)
        log.info(
            "%s: call of the %s for %d rows%s recorded, %.1f ms instead of %.1f",
            self._model.facts.name,
            shape.form.subject,
            shape.rows,
            f" with {shape.form.kind}" if shape.form.kind else "",
            1000 * seconds,
            1000 * plain_s,
        )

    def _gives_the_same(
        self, shape: Shape, made: Replay, evaluate: Callable[..., Tensor], tensors: list[Tensor]
    ) -> Generator[None, None, bool]:
        """Whether a recording reproduces its pass; otherwise all passes of its kind stay eager."""
        # The second inputs have other numbers: results must not depend on what was recorded.
        others = [one * 0.5 if one.is_floating_point() else one for one in tensors]
        for given in (tensors, others):
            expected = evaluate(*given)
            if given is tensors and not expected.isfinite().all():
                # The image had become NaN; later passes of this shape should still be recorded.
                return False
            if not (made(*given) - expected).abs().max() <= self._close * expected.abs().max():
                self._give_up(shape, "its recording gives different results", None)
                return False
            yield
        return True

    def _keep(self, shape: Shape, made: Replay) -> None:
        if len(self._recorded) == MAX_GRAPHS:
            self._recorded.pop(next(iter(self._recorded))).release()
        self._recorded[shape] = made
        # The pass may have run again since its recording began.
        self._wanted.pop(shape, None)

    def _return_memory(self) -> None:
        """Return memory that no recording uses now."""
        if not self._recorded and self._under_way is None:
            self._recorder.reset_pool()
        free_memory(self._model.device)

    def _of_tensors(self, shape: Shape) -> Callable[..., Tensor]:
        """The model's forward pass as a function of its tensors alone."""
        names = [name for name, *_ in shape.others]

        def evaluate(*tensors: Tensor) -> Tensor:
            return shape.form.evaluate(self._model, dict(zip(names, tensors, strict=True)))

        return evaluate

    def _give_up(self, shape: Shape, reason: str, error: Exception | None) -> None:
        """Run all passes of this kind eagerly from now on."""
        self._repeatable[shape.kind] = False
        log.warning(
            "%s: calls of the %s with %s run without CUDA graphs: %s",
            self._model.facts.name,
            shape.form.subject,
            ", ".join(f"{name} {list(size)}" for name, size, _ in shape.others),
            reason,
            exc_info=error,
        )


def shape_of(tensors: ForwardInputs, form: Form) -> Shape:
    """The shape of a forward pass."""
    others = tuple((name, one.shape[1:], one.dtype) for name, one in tensors.items())
    return Shape(len(tensors["x"]), others, form)


def worth_recording(runs: int, forward_s: float, max_s: float) -> bool:
    """Whether to record a pass between ticks, for lack of quiet moments.

    Args:
        runs: number of times that it has run without a recording.
        forward_s: seconds that it takes.
        max_s: maximum seconds of a piece of the recording.
    """
    return runs >= BUSY_THRESHOLD and PIECE_FORWARDS * forward_s <= max_s


def _seconds(call: Callable[[], Tensor]) -> float:
    began = perf_counter()
    # Reading one number waits for the device.
    call().flatten()[0].item()
    return perf_counter() - began
