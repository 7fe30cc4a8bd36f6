"""Forwards that a GPU repeats from a recording, without a word from Python: CUDA graphs.

Below about 12 rows a GPU waits for its orders: a U-Net has some thousand kernels, and Python takes
longer to ask for them than an H100 to run them. A graph asks for all of them at once.

A forward is recorded while nothing waits, or, if there is always something, in pieces between ticks
once it has run often; until then it runs as ever. A recording is of one shape, of rows, latents and
conditioning, and of one form of what the rows change inside the network: of one combination of
adapters, say. Forms are many, so that one is recorded only once it has run a few times, and a
recording is dropped as soon as something that it reads is gone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import inf
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch

from server.engine.faults import free_memory, is_out_of_memory, lost_device
from server.engine.unrepeatable import unrepeatable
from server.models.inputs_form import Gone, form_of, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Mapping, Sequence

    from torch import Tensor

    from server.engine.cost_model import TickCost
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs
    from server.models.inputs_form import InputsForm

__all__ = ["Graphs", "pays_beside_ticks"]

log = logging.getLogger(__name__)

PAYS = 0.95
"""Share of the time without a recording that a forward with one may take, to be worth keeping."""

TIMED = 3
"""Forwards of which the fastest counts, without a recording and with it."""

CLOSE = 0.01
"""By how much of the largest number a recording may differ from the forward that it was made of.

They are equal to the bit where libraries choose the same kernels; an error of a recording is large.
"""

OFTEN = 40
"""Forwards of a shape after which it is recorded though something waits.

A recording takes about 10 forwards, and one saves half of a forward of few rows, or more: so twice
what it takes is lost by then, and at most a quarter is added to it where nothing is saved.
"""

FEW = 5
"""Forwards of a shape and form after which it is recorded in a quiet moment, unless it is plain."""

PIECE_FORWARDS = 3
"""Forwards that the longest piece of a recording takes: one that is watched operation by operation,
or two and a replay."""

WANTED_KEPT = 16
WANTED_BYTES = 2**28
"""What is kept of forwards until they are recorded: hints of ControlNets are large."""

MOST_GRAPHS = 64

REST_S = 300.0
"""Seconds after memory was short in which nothing is recorded."""

Given: TypeAlias = "Mapping[str, Tensor]"
"""Tensors of a forward by name: x and t, then all of its inputs."""


class Replay(Protocol):
    """A recording of a forward."""

    def __call__(self, *given: Tensor) -> Tensor:
        """What the forward puts out for other tensors of the same shapes."""
        ...

    def release(self) -> None:
        """Give back its memory."""
        ...


class Recorder(Protocol):
    """Makes the recordings of one model."""

    @property
    def nbytes(self) -> int:
        """Memory that the recordings hold."""
        ...

    def fits(self, forward: Callable[[], Tensor], room: float) -> bool:
        """Whether a recording of a forward takes no more bytes than that; may run it."""
        ...

    def record(self, evaluate: Callable[..., Tensor], given: Sequence[Tensor]) -> Replay:
        """Record a function of tensors like the given ones."""
        ...

    def begin_anew(self) -> None:
        """There is no recording any more."""
        ...


class Shape(NamedTuple):
    """What shapes a forward.

    Attributes:
        rows: of the forward.
        others: name, size beyond the rows, and type of each tensor.
        form: of the inputs.
    """

    rows: int
    others: tuple[tuple[str, torch.Size, torch.dtype], ...]
    form: InputsForm

    @property
    def kind(self) -> Hashable:
        """Equal of forwards that can all be repeated, or none of them."""
        return self.others, self.form.kind


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """A forward that ran without a recording.

    Attributes:
        given: to the last one.
        cost: of ticks, which learns how long they take with a recording.
        runs: how often there was one.
    """

    given: Given
    cost: TickCost
    runs: int

    @property
    def nbytes(self) -> int:
        """Of what was given."""
        return sum(one.nbytes for one in self.given.values())


class Graphs:
    """The recordings of one model's forwards, which share their memory.

    Args:
        model: whose forwards.
        recorder: makes them.
        room: bytes that recordings may take, beside what they hold.
        exact: recordings must equal their forwards to the bit.
    """

    def __init__(
        self,
        model: HostedModel,
        recorder: Recorder,
        room: Callable[[], float] = lambda: inf,
        *,
        exact: bool = False,
    ) -> None:
        self._model = model
        self._recorder = recorder
        self._room = room
        self._close = 0.0 if exact else CLOSE
        self._recorded: dict[Shape, Replay] = {}
        self._wanted: dict[Shape, _Wanted] = {}
        self._under_way: tuple[Shape, Generator[None]] | None = None
        self._repeatable: dict[Hashable, bool] = {}
        self._ends: dict[Hashable, int] = {}
        self._rests_until = -inf
        self._generation = 0
        # For its first look at operations torch imports for seconds, which nobody is to wait for.
        unrepeatable(lambda: torch.empty(1), torch.device("cpu"))

    @property
    def rows(self) -> list[int]:
        """Numbers of rows that are recorded, in order."""
        return sorted({shape.rows for shape in list(self._recorded)})

    @property
    def nbytes(self) -> int:
        """Memory that they hold."""
        return self._recorder.nbytes

    @property
    def wanted(self) -> bool:
        """Whether a forward is to be recorded, or is being recorded."""
        return self._under_way is not None or bool(self._ripe())

    def due(self, most_s: float) -> bool:
        """Whether to record the next piece though something waits.

        Args:
            most_s: seconds that a piece may take.
        """
        return self._under_way is not None or self._often(most_s) is not None

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs, cost: TickCost) -> Tensor:
        """See ``HostedModel.evaluate``.

        Args:
            x: of all rows.
            t: of all rows.
            inputs: of all rows.
            cost: of the ticks, which is corrected should this forward be recorded.
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
        tensors = {"x": x, "t": t} | tensors_of(inputs)
        shape = shape_of(tensors, form)
        recorded = self._recorded.pop(shape, None)
        if recorded is not None:
            # Behind all others, of which those go first that were replayed least lately.
            self._recorded[shape] = recorded
            return recorded(*tensors.values())
        if self._may_be_recorded(shape):
            before = self._wanted.pop(shape, None)
            runs = 1 if before is None else before.runs + 1
            self._wanted[shape] = _Wanted(tensors, cost, runs)
            self._keep_latest()
        return self._model.evaluate(x, t, inputs)

    def _keep_latest(self) -> None:
        """Let go of forwards that have not run again for long, where there are too many."""
        held = sum(one.nbytes for one in self._wanted.values())
        while len(self._wanted) > WANTED_KEPT or (held > WANTED_BYTES and len(self._wanted) > 1):
            held -= self._wanted.pop(next(iter(self._wanted))).nbytes

    def record(self) -> None:
        """Record the smallest forward that is wanted, while nothing else waits for the device.

        Raises:
            Exception: the device is lost.
        """
        self._drop_dead()
        ripe = [] if self._under_way else self._ripe()
        self._advance(min(ripe, key=lambda one: one.rows) if ripe else None)
        while self._under_way is not None:
            self._advance(None)

    def record_piece(self, most_s: float) -> None:
        """Record a piece of a forward that is :meth:`due`, between two ticks.

        Raises:
            Exception: the device is lost.
        """
        self._drop_dead()
        self._advance(None if self._under_way else self._often(most_s))

    def release(self) -> bool:
        """Give all memory back, and record nothing for a while.

        Returns:
            Whether there was anything to give back.
        """
        held = bool(self._recorded or self._wanted or self._under_way)
        self._forget()
        self._rest()
        return held

    def _forget(self) -> None:
        """Let go of all recordings."""
        self._stop()
        for one in self._recorded.values():
            one.release()
        self._recorded = {}
        self._recorder.begin_anew()

    def _stop(self) -> None:
        """Let go of the recording under way."""
        if self._under_way is not None:
            _, pieces = self._under_way
            self._under_way = None
            pieces.close()

    def _drop_dead(self) -> None:
        """Let go of what can never run again, as something that it reads is gone."""
        if self._under_way is not None and not self._under_way[0].form.alive:
            self._stop()
        self._wanted = {shape: one for shape, one in self._wanted.items() if shape.form.alive}
        dead = [shape for shape in self._recorded if not shape.form.alive]
        for shape in dead:
            self._recorded.pop(shape).release()
        if dead:
            self._give_back()

    def _ripe(self) -> list[Shape]:
        """The forwards that are worth a recording in a quiet moment."""
        wanted = list(self._wanted.items())
        return [shape for shape, one in wanted if not shape.form.kind or one.runs >= FEW]

    def _often(self, most_s: float) -> Shape | None:
        """The forward that has run most often, of those that are worth a recording now."""
        often = {
            shape: one.runs
            for shape, one in self._wanted.items()
            if pays_beside_ticks(one.runs, one.cost.seconds(shape.rows), most_s)
        }
        return max(often, key=lambda shape: often[shape]) if often else None

    def _advance(self, shape: Shape | None) -> None:
        """Go on with the recording under way, or begin that of a shape."""
        if shape is not None:
            self._under_way = shape, self._pieces(shape, self._wanted.pop(shape))
        if self._under_way is None:
            return
        _, pieces = self._under_way
        try:
            next(pieces)
        except StopIteration:
            self._under_way = None
            self._give_back()

    def _pieces(self, shape: Shape, wanted: _Wanted) -> Generator[None]:
        if not self._may_be_recorded(shape):
            return
        try:
            yield from self._record(shape, wanted)
        except Gone:
            return
        except Exception as error:
            if lost_device(error, self._model.device):
                raise
            if is_out_of_memory(error):
                self._under_way = None
                self.release()
                return
            self._give_up(shape, "recording it failed", error)

    def _rest(self) -> None:
        self._wanted = {}
        self._rests_until = monotonic() + REST_S

    def _may_be_recorded(self, shape: Shape) -> bool:
        if monotonic() < self._rests_until or not self._repeatable.get(shape.kind, True):
            return False
        return shape.rows < self._ends.get(shape.kind, inf)

    def _record(self, shape: Shape, wanted: _Wanted) -> Generator[None]:
        evaluate, tensors = self._of_tensors(shape), [*wanted.given.values()]
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
        yield
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
            if seconds > PAYS * plain_s:
                self._ends[shape.kind] = shape.rows
                return
            self._keep(shape, made)
        finally:
            if self._recorded.get(shape) is not made:
                made.release()
        if not shape.form.kind:
            wanted.cost.correct(shape.rows, seconds)
        log.info(
            "%s: forward of %d rows%s recorded, %.1f ms instead of %.1f",
            self._model.facts.name,
            shape.rows,
            f" with {shape.form.kind}" if shape.form.kind else "",
            1000 * seconds,
            1000 * plain_s,
        )

    def _gives_the_same(
        self, shape: Shape, made: Replay, evaluate: Callable[..., Tensor], tensors: list[Tensor]
    ) -> Generator[None, None, bool]:
        """Whether a recording gives the numbers of its forward, without which all such end."""
        # Other numbers than those that were recorded, which a recording must not have kept.
        others = [one * 0.5 if one.is_floating_point() else one for one in tensors]
        for given in (tensors, others):
            expected = evaluate(*given)
            if given is tensors and not expected.isfinite().all():
                # It was of an image that had become NaN: those after it are to be recorded.
                return False
            if not (made(*given) - expected).abs().max() <= self._close * expected.abs().max():
                self._give_up(shape, "its recording gives other numbers", None)
                return False
            yield
        return True

    def _keep(self, shape: Shape, made: Replay) -> None:
        if len(self._recorded) == MOST_GRAPHS:
            self._recorded.pop(next(iter(self._recorded))).release()
        self._recorded[shape] = made
        # It may have run again since its recording began.
        self._wanted.pop(shape, None)

    def _give_back(self) -> None:
        """Give back memory that no recording has any more."""
        if not self._recorded and self._under_way is None:
            self._recorder.begin_anew()
        free_memory(self._model.device)

    def _of_tensors(self, shape: Shape) -> Callable[..., Tensor]:
        """The model's forward as a function of its tensors alone."""
        names = [name for name, *_ in shape.others]

        def evaluate(*tensors: Tensor) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            x, t = given.pop("x"), given.pop("t")
            return self._model.evaluate(x, t, shape.form.inputs(given))

        return evaluate

    def _give_up(self, shape: Shape, reason: str, error: Exception | None) -> None:
        """Run all forwards of these shapes as ever from now on."""
        self._repeatable[shape.kind] = False
        log.warning(
            "%s: forwards of %s run without CUDA graphs: %s",
            self._model.facts.name,
            ", ".join(f"{name} {list(size)}" for name, size, _ in shape.others),
            reason,
            exc_info=error,
        )


def shape_of(tensors: Given, form: InputsForm) -> Shape:
    """The shape of a forward."""
    others = tuple((name, one.shape[1:], one.dtype) for name, one in tensors.items())
    return Shape(len(tensors["x"]), others, form)


def pays_beside_ticks(runs: int, forward_s: float, most_s: float) -> bool:
    """Whether to record a forward between ticks, as there is no quiet moment.

    Args:
        runs: how often it has run without a recording.
        forward_s: seconds that it takes.
        most_s: seconds that a piece of the recording may take.
    """
    return runs >= OFTEN and PIECE_FORWARDS * forward_s <= most_s


def _seconds(call: Callable[[], Tensor]) -> float:
    began = perf_counter()
    # Reading one number waits for the device.
    call().flatten()[0].item()
    return perf_counter() - began
