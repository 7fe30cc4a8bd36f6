"""Preparation of a GPU before images need it: the first calls of every size, and recordings."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from server.engine.autoencoder_calls import AutoencoderCalls
from server.engine.forwards import Forwards
from server.engine.graphs import Graphs
from server.models.weights_held import bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from server.engine.cost_model import TickCost
    from server.engine.graphs import Recorder
    from server.models.hosted import HostedModel

__all__ = ["AT_START", "Preparation", "PreparedForwards"]

AT_START = 16
"""Number of rows of the largest forward pass that runs before the server is ready. Larger ones take
as long as all of these together, and are rare right after a start."""

MAX_CACHED_SHAPES = 8
"""Number of latent shapes, besides the default ones, whose forward passes are prepared."""

Shape: TypeAlias = "tuple[int, int, int]"


class PreparedForwards(NamedTuple):
    """What has been prepared for a model's forward passes.

    Attributes:
        rows: numbers of rows at which passes of its default size have run, in ascending order.
        recorded: numbers of rows of passes that are recorded as CUDA graphs.
    """

    rows: tuple[int, ...] = ()
    recorded: tuple[int, ...] = ()


class Preparation:
    """First calls and recordings of all models' passes, in pieces of about a second each.

    It belongs to the engine's thread, since torch keeps its choices of kernels per thread.

    Args:
        recorder_of: function that makes the recorder of a model's passes; None to record none.
        max_bytes: maximum bytes of the device for weights and recordings of all models together.
        fixed: whether passes have fixed rows; a recording must then equal its pass bit for bit.
    """

    def __init__(
        self,
        recorder_of: Callable[[HostedModel], Recorder] | None = None,
        max_bytes: float = inf,
        *,
        fixed: bool = False,
    ) -> None:
        self._recorder_of = recorder_of
        self._max_bytes = max_bytes
        self._fixed = fixed
        self._weights: dict[str, int] = {}
        self._graphs: dict[str, Graphs] = {}
        self._autoencoders: dict[str, AutoencoderCalls] = {}
        self._first_calls: deque[tuple[str, Callable[[], object]]] = deque()
        self._forwards: dict[tuple[str, Shape], Forwards] = {}
        self._defaults: set[tuple[str, Shape]] = set()

    def add(self, model: HostedModel, shape: Shape, cost: TickCost, max_rows: int) -> Forwards:
        """Add a model with its default latent shape.

        Args:
            model: loaded model.
            shape: shape of its latents at its default size, ``(C, h, w)``.
            cost: cost of its ticks at that shape.
            max_rows: maximum number of rows in a forward pass.
        """
        name = model.facts.name
        self._defaults.add((name, shape))
        self._weights[name] = bytes_of(model)
        # With offloaded blocks, a graph would read copies of weights that no longer exist.
        recorder_of = None if model.placement.offload == "all" else self._recorder_of
        if recorder_of is not None:
            recorder = recorder_of(model)
            self._graphs[name] = Graphs(model, recorder, self._room, exact=self._fixed)
        autoencoder = AutoencoderCalls(model, recorder_of, self._room, fixed=self._fixed)
        self._autoencoders[name] = autoencoder
        self._first_calls.extend((name, call) for call in autoencoder.first_calls())
        return self.forwards(model, shape, cost, max_rows)

    def forwards(self, model: HostedModel, shape: Shape, cost: TickCost, max_rows: int) -> Forwards:
        """The forward passes of a model at a latent shape, which are prepared from now on."""
        key = model.facts.name, shape
        made = self._forwards.pop(key, None)
        if made is None:
            graphs = self._graphs.get(key[0])
            made = Forwards(model, shape, cost, max_rows, graphs, fixed=self._fixed)
            others = [one for one in self._forwards if one not in self._defaults]
            for old in others[: max(0, len(others) + 1 - MAX_CACHED_SHAPES)]:
                del self._forwards[old]
        self._forwards[key] = made
        return made

    def autoencoder(self, model: HostedModel) -> AutoencoderCalls | None:
        """The calls of a model's autoencoder; None for a model that was not added."""
        return self._autoencoders.get(model.facts.name)

    def of(self, name: str, shape: Shape) -> PreparedForwards:
        """What has been prepared for a model at a latent shape; safe from any thread."""
        forwards, graphs = self._forwards.get((name, shape)), self._graphs.get(name)
        return PreparedForwards(
            () if forwards is None else forwards.sizes.known,
            () if graphs is None else tuple(graphs.rows),
        )

    def forget(self, name: str) -> None:
        """Release a model."""
        self._weights.pop(name, None)
        for graphs in self._recorded_of(name):
            graphs.release()
        self._graphs.pop(name, None)
        self._autoencoders.pop(name, None)
        self._first_calls = deque(one for one in self._first_calls if one[0] != name)
        self._forwards = {key: one for key, one in self._forwards.items() if key[0] != name}
        self._defaults = {key for key in self._defaults if key[0] != name}

    @property
    def recorded_bytes(self) -> int:
        """Bytes of memory that recordings hold; safe from any thread."""
        return sum(graphs.nbytes for graphs in self._recorded())

    def release(self) -> bool:
        """Free the memory of all recordings, as memory is short; return whether there was any."""
        released = [graphs.release() for graphs in self._recorded()]
        return any(released)

    def next(self, max_rows: int | None = None) -> Callable[[], object] | None:
        """Return the piece most likely to be needed soon, or None if all is done.

        Args:
            max_rows: maximum number of rows of a pass that counts; None for all passes and for
                recordings.
        """
        if self._first_calls:
            return self._first_calls.popleft()[1]
        waiting = [one for one in self._forwards.values() if one.wants(max_rows)]
        waiting.sort(key=lambda one: one.sizes.wanted[0])
        if waiting and waiting[0].wants(AT_START):
            return waiting[0].prepare
        recorded = [one for one in self._recorded() if one.wanted and max_rows is None]
        if recorded:
            return recorded[0].record
        return waiting[0].prepare if waiting else None

    def next_beside_ticks(self, max_s: float) -> Callable[[], object] | None:
        """Return the next piece of a recording that is worth making between ticks, if any.

        Args:
            max_s: maximum seconds that it may take.
        """
        for graphs in self._recorded():
            if graphs.due(max_s):
                return lambda: graphs.record_piece(max_s)
        return None

    def _recorded(self) -> Iterator[Graphs]:
        """Recordings of all models; safe from any thread."""
        for name in list(self._autoencoders):
            yield from self._recorded_of(name)

    def _recorded_of(self, name: str) -> Iterator[Graphs]:
        """Recordings of a model, first those of its denoiser, which has the most calls."""
        if (graphs := self._graphs.get(name)) is not None:
            yield graphs
        if (autoencoder := self._autoencoders.get(name)) is not None:
            yield from autoencoder.graphs

    def _room(self) -> float:
        return self._max_bytes - sum(self._weights.values()) - self.recorded_bytes
