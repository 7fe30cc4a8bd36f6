"""The models of a server: those that are loaded, and those that can be loaded on demand."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Final, Protocol, Self

from server.engine.engine import Engine
from server.engine.faults import is_out_of_memory
from server.engine.preparation import PreparedForwards
from server.errors import (
    ModelInUse,
    ModelMismatch,
    ModelTooLarge,
    NotReady,
    UnknownModel,
    WeftError,
)
from server.models.hosted import HostedModel
from server.models.memory import reclaim
from server.models.weights_held import bytes_of, offloaded_bytes_of

__all__ = ["Lease", "MemoryBudget", "ModelShelf", "ModelState", "Source"]

log = logging.getLogger("weft")

RETRY_S: Final = 0.2
"""Seconds until a model that found no room is tried again."""

FAILURE_EXPIRY_S: Final = 10.0
"""Seconds for which a model that failed to load is refused without reading its files again."""


WAITED_S: Final = 5.0
"""Seconds that a model must have waited for room before models in use give way to it; most are not
in use for a moment by then."""

MIN_TURN_S: Final = 30.0
TURN_LOADS: Final = 3.0
"""A model in use keeps its room for as many seconds, and for as many times the time that loading it
took: with more models in demand than fit, most of the time must not be spent on loading."""

NO_TURN_S: Final = 600.0
"""Seconds after a failed load for which models in use do not give way to this model: if its files
are broken, it would take their room for nothing, again and again."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes available for weights: now, and if no other model were loaded."""

    free: int
    total: int


class Source(Protocol):
    """Source of models that are not loaded; called in the shelf's own thread."""

    def created(self) -> Mapping[str, int]:
        """The models that can be loaded, and when each was made, in seconds of Unix time.

        Safe from any thread; takes a second at most.
        """
        ...

    def needs(self, name: str) -> int:
        """Bytes that the weights of a model will take; raises like :meth:`load`."""
        ...

    def needs_on_host(self, name: str) -> int:
        """Bytes of host memory that a model will use in addition; raises like :meth:`load`."""
        ...

    def host_free(self) -> int:
        """Bytes of host memory that are free now."""
        ...

    def room(self, loaded_bytes: int) -> MemoryBudget:
        """Bytes for weights, given those of the loaded models and their CUDA graphs."""
        ...

    def load(self, name: str, on_progress: Callable[[int, int], None]) -> HostedModel:
        """Load a model; raises ModelMismatch with a sentence for clients."""
        ...


@dataclass(frozen=True, slots=True)
class ModelState:
    """The current state of a model of the server.

    Attributes:
        name: name in requests.
        default: whether requests that name no model get it.
        created: time at which it was made, in seconds of Unix time.
        model: the model, if it is loaded.
        memory_bytes: bytes of its weights on its device; 0 if it is not loaded.
        offloaded_bytes: bytes of its weights in host memory beside another device.
        loaded_since: seconds of Unix time; None if it is not loaded.
        loading: fraction of it that has been read, while it is being loaded.
        prepared: what the engine has prepared for its forward passes.
    """

    name: str
    default: bool
    created: int
    model: HostedModel | None
    memory_bytes: int
    offloaded_bytes: int
    loaded_since: float | None
    loading: float | None
    prepared: PreparedForwards


class Lease:
    """A loaded model that stays loaded until the lease is released, for example by ``with``."""

    def __init__(self, model: HostedModel, on_release: Callable[[], None]) -> None:
        self.model = model
        self._release: Callable[[], None] | None = on_release

    def release(self) -> None:
        """Allow the model to be unloaded; does nothing the second time."""
        on_release, self._release = self._release, None
        if on_release is not None:
            on_release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class _ShelfEntry:
    """State that the shelf keeps for one model.

    Attributes:
        users: number of leases, and of requests that wait for one.
        leases: number of leases.
        live: number of leases of live streams, which have no end in sight.
        used_at: time at which the last of the users left.
        turn_until: time until which it need not give way to others.
        gives_way_to: model that waits for its room; there are no more leases of it until then.
        given_way: future that is set once this is over.
        wanted_at: time at which the load was wanted.
        loading: future of a load, with its error or None; set while a load is wanted.
        progress: fraction of its bytes that have been read.
        crowded: whether other models that are in use leave no room for it.
        refusal: why it could not be loaded, and until when that is assumed to hold.
    """

    name: str
    model: HostedModel | None = None
    memory_bytes: int = 0
    offloaded_bytes: int = 0
    loaded_since: float | None = None
    users: int = 0
    leases: int = 0
    live: int = 0
    used_at: float = 0.0
    turn_until: float = 0.0
    gives_way_to: _ShelfEntry | None = None
    given_way: Future[WeftError | None] = field(default_factory=Future[WeftError | None])
    wanted_at: float = 0.0
    loading: Future[WeftError | None] | None = None
    progress: float = 0.0
    crowded: bool = False
    refusal: tuple[WeftError, float] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it is loaded, and may be unloaded now."""
        gives_way = self.gives_way_to is not None and not self.leases
        return self.model is not None and (gives_way or not self.users)

    def hold(self, model: HostedModel, load_s: float = 0.0) -> None:
        self.model, self.memory_bytes = model, bytes_of(model)
        self.offloaded_bytes = offloaded_bytes_of(model)
        self.loaded_since, self.used_at = time.time(), time.monotonic()
        self.turn_until = self.used_at + max(MIN_TURN_S, TURN_LOADS * load_s)
        self.refusal = None


class ModelShelf:
    """Lends models to requests, and loads those that are not loaded; safe from any thread.

    One model is loaded at a time, in a separate thread. If memory is short, it first unloads the
    least recently used models that have no lease and no image in the engine. If the leases of
    others never end because there are always new ones, models take turns: those that have had
    theirs are not lent any more until the one that waits has been loaded.

    Args:
        engine: engine that runs them.
        models: models that are loaded already; the first is the default.
        source: source of other models; None if there is none.
        patience_s: seconds that a request waits for a model to be loaded.
    """

    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, HostedModel],
        source: Source | None = None,
        patience_s: float = 300.0,
    ) -> None:
        self._engine = engine
        self._source = source
        self._patience_s = patience_s
        self._default = next(iter(models))
        self._places: dict[str, _ShelfEntry] = {}
        self._wake = Condition()
        self._jobs: list[_ShelfEntry] = []
        self._unwanted: list[tuple[_ShelfEntry, Future[WeftError | None]]] = []
        self._closed: WeftError | None = None
        self._thread: Thread | None = None
        for name, model in models.items():
            self._place(name).hold(model)

    def hosts(self, name: str) -> bool:
        """Whether a model has this name; looks at folders, which takes a second at most."""
        return self._is_loaded(name) or name in self._names()

    async def check(self, name: str | None) -> None:
        """Refuse a name that no model has.

        Raises:
            UnknownModel: no such model is hosted.
        """
        if name is None or self._is_loaded(name):
            return
        known = await asyncio.to_thread(self._names)
        if name not in known:
            raise UnknownModel(name[:60], known)

    def loaded(self) -> tuple[HostedModel, ...]:
        """The loaded models, with the default one first if it is loaded."""
        with self._wake:
            places = dict.fromkeys((self._place(self._default), *self._places.values()))
            return tuple(place.model for place in places if place.model is not None)

    def bytes_loaded(self) -> dict[str, int]:
        """Bytes of the weights of each loaded model on its device, by name."""
        with self._wake:
            places = [place for place in self._places.values() if place.model is not None]
            return {place.name: place.memory_bytes for place in places}

    def if_loaded(self, name: str | None) -> HostedModel | None:
        """A model by name, None for the default one; returns None if it is not loaded."""
        return self._place(self._default if name is None else name).model

    def states(self) -> tuple[ModelState, ...]:
        """States of all models, with the default one first."""
        created = self._created()
        return tuple(self._state(name, created.get(name, 0)) for name in self._names_with(created))

    async def lend(self, name: str | None, *, live: bool = False) -> Lease:
        """Lend a model by name, None for the default one; wait until it is loaded.

        Args:
            name: name of the model.
            live: whether the lease is a live stream's, which models that wait do not wait for.

        Raises:
            UnknownModel: no such model is hosted.
            ModelMismatch: it cannot be loaded.
            ModelTooLarge: it does not fit in memory, even alone.
            NotReady: it is not loaded in time, or the server is about to stop.
        """
        await self.check(name)
        place = self._place(self._default if name is None else name)
        with self._wake:
            place.users += 1
        try:
            model = await self._leased(place, live=live)
        except BaseException:
            self._leave(place)
            raise
        return Lease(model, lambda: self._release(place, live=live))

    async def unload(self, name: str | None) -> None:
        """Unload a model by name, None for the default one; requests load it again.

        Raises:
            UnknownModel: no such model is hosted.
            ModelInUse: there is a lease of it, or a request that waits for one.
            NotReady: it could not be loaded again, another model takes too long to load, or the
                server is about to stop.
        """
        await self.check(name)
        place = self._place(self._default if name is None else name)
        self._required_source()
        with self._wake:
            if self._closed is not None:
                raise copy(self._closed)
            unloading: Future[WeftError | None] = Future()
            self._unwanted.append((place, unloading))
            self._start()
        waiting = asyncio.wrap_future(unloading)
        try:
            await asyncio.wait({waiting}, timeout=self._patience_s)
        finally:
            # A caller that was told to come back, or has left, must not cause an unload later.
            withdrawn = self._withdraws(place, unloading)
        if withdrawn:
            raise NotReady("Another model is being loaded; send the request again later.")
        # It has begun, and must report its outcome although the caller may no longer wait.
        error = await asyncio.shield(waiting)
        if error is not None:
            raise copy(error)

    def close(self, error: WeftError) -> None:
        """Load no more models; requests that wait for one get the error."""
        with self._wake:
            self._closed = error
            unwanted, self._unwanted = self._unwanted, []
            for _, unloading in unwanted:
                unloading.set_result(error)
            for place in list(self._jobs):
                self._settle(place, error)
            self._wake.notify_all()

    def _is_loaded(self, name: str) -> bool:
        with self._wake:
            place = self._places.get(name)
            return place is not None and place.model is not None

    def _withdraws(self, place: _ShelfEntry, unloading: Future[WeftError | None]) -> bool:
        """Withdraw an unload that has not begun; return whether that succeeded."""
        with self._wake:
            waits = (place, unloading) in self._unwanted
            if waits:
                self._unwanted.remove((place, unloading))
            return waits

    async def _leased(self, place: _ShelfEntry, *, live: bool) -> HostedModel:
        until = time.monotonic() + self._patience_s
        while True:
            with self._wake:
                model = place.model
                if model is not None and place.gives_way_to is None:
                    place.leases += 1
                    place.live += live
                    return model
                awaited = self._wanted(place) if place.gives_way_to is None else place.given_way
            waiting = asyncio.wrap_future(awaited)
            done, _ = await asyncio.wait({waiting}, timeout=until - time.monotonic())
            if not done:
                raise NotReady(self._late(place), retry_after_s=30)
            error = waiting.result()
            if error is not None:
                # A copy: each waiting task raises it, which adds to the traceback.
                raise copy(error)

    def _wanted(self, place: _ShelfEntry) -> Future[WeftError | None]:
        """Outcome of the load that is under way, or of a new one."""
        if place.loading is not None:
            return place.loading
        loading: Future[WeftError | None] = Future()
        known = self._closed or _believed(place)
        if known is not None:
            loading.set_result(known)
            return loading
        place.loading, place.progress, place.crowded = loading, 0.0, False
        place.wanted_at = time.monotonic()
        self._jobs.append(place)
        self._start()
        return loading

    def _start(self) -> None:
        """Wake the shelf's own thread, and start it if necessary."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="weft-loader", daemon=True)
            self._thread.start()
        self._wake.notify_all()

    def _late(self, place: _ShelfEntry) -> str:
        waited = f"after {self._patience_s:.0f} s"
        if place.gives_way_to is not None:
            return (
                f"Model {place.name!r} has given way to others {waited}, as not all models in "
                "demand fit in memory; send the request again later."
            )
        if place.crowded:
            return (
                f"Model {place.name!r} is not loaded {waited}: the models in use leave no room for "
                "it; send the request again later."
            )
        return f"Model {place.name!r} is still being loaded {waited}; send the request again."

    def _release(self, place: _ShelfEntry, *, live: bool) -> None:
        with self._wake:
            place.leases -= 1
            place.live -= live
        self._leave(place)

    def _leave(self, place: _ShelfEntry) -> None:
        with self._wake:
            place.users -= 1
            place.used_at = time.monotonic()
            self._wake.notify_all()

    def _work(self) -> None:
        """Load wanted models and unload unwanted ones, in the shelf's own thread."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._unwanted or self._closed)
                if self._closed is not None:
                    return
                jobs = list(self._jobs)
                unwanted = self._unwanted.pop(0) if self._unwanted else None
            if unwanted is not None:
                place, unloading = unwanted
                with self._engine.undisturbed():
                    error = self._unloaded(place)
                unloading.set_result(error)
                continue
            with self._engine.undisturbed():
                over = any(self._attempt(place) for place in jobs)
            if over:
                continue
            with self._wake:
                self._wake.wait(RETRY_S)

    def _attempt(self, place: _ShelfEntry) -> bool:
        """Load a model if there is room; return whether its job is finished."""
        with self._wake:
            if place.loading is None:
                return True
            if place.users == 0 or place.model is not None:
                self._settle(place, None)
                return True
        try:
            place.crowded = not (self._make_room_on_host(place) and self._make_room(place))
            if place.crowded:
                return False
            self._load(place)
        except WeftError as error:
            # A copy without the traceback, whose frames hold what was loaded.
            refusal = copy(error)
        except Exception as error:
            log.exception("model %s could not be loaded", place.name)
            refusal = _refusal(place.name, error)
        else:
            self._settle(place, None)
            return True
        place.refusal = refusal, time.monotonic() + FAILURE_EXPIRY_S
        reclaim(self._engine.device)
        self._settle(place, refusal)
        return True

    def _load(self, place: _ShelfEntry) -> None:
        source = self._required_source()
        log.info("loading model %s", place.name)
        began = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            place.progress = done / total if total else 0.0

        model = source.load(place.name, on_progress)
        self._engine.add_model(model)
        with self._wake:
            place.hold(model, time.monotonic() - began)
        log.info(
            "model %s is loaded: %d MB in %.1f s",
            place.name,
            place.memory_bytes // 2**20,
            time.monotonic() - began,
        )

    def _make_room(self, place: _ShelfEntry) -> bool:
        """Unload others until a model fits; return False while models in use leave no room."""
        source = self._required_source()
        needed = source.needs(place.name)
        while True:
            room = source.room(self._loaded_bytes())
            if needed > room.total:
                raise ModelTooLarge(
                    f"Model {place.name!r} needs {needed} bytes for its weights; at most "
                    f"{room.total} bytes are allowed here."
                )
            if needed <= room.free:
                return True
            idle = self._idle()
            if needed > room.free + sum(one.memory_bytes for one in idle):
                if self._engine.release_recordings():
                    continue
                if len(idle) == len(self.loaded()):
                    raise NotReady(
                        f"Model {place.name!r} needs {needed} bytes for its weights; "
                        f"{room.free} bytes are free, and unloading others would not be enough.",
                        retry_after_s=60,
                    )
                lacking = needed - room.free - sum(one.memory_bytes for one in idle)
                self._ask_to_give_way(place, lacking, lambda one: one.memory_bytes)
                return False
            if not self._unload(idle[0]):
                return False

    def _ask_to_give_way(
        self, place: _ShelfEntry, lacking: int, freed_by: Callable[[_ShelfEntry], int]
    ) -> None:
        """Lend models in use no more until another has been loaded, if they have had their turn.

        Args:
            place: model that waits for room.
            lacking: bytes that they must free, beside models that are not in use.
            freed_by: function that returns the bytes that unloading a model frees.
        """
        now = time.monotonic()
        failed_of_late = place.refusal is not None and now < place.refusal[1] + NO_TURN_S
        if failed_of_late or now < place.wanted_at + WAITED_S:
            return
        with self._wake:
            others = list(self._places.values())
            asked = [one for one in others if one.gives_way_to is place and not one.is_idle]
            lacking -= sum(map(freed_by, asked))
            able = [
                one
                for one in others
                if one.model is not None and one.users and not one.live and one.turn_until <= now
                if freed_by(one) > 0
            ]
            chosen: list[_ShelfEntry] = []
            for one in sorted(able, key=lambda one: one.turn_until):
                if lacking > 0 and one.gives_way_to is None:
                    chosen.append(one)
                    lacking -= freed_by(one)
            if lacking > 0:
                return
            for one in chosen:
                log.info("model %s gives way to model %s", one.name, place.name)
                one.gives_way_to, one.given_way = place, Future()

    def _make_room_on_host(self, place: _ShelfEntry) -> bool:
        """Unload others until host memory suffices for a model; return False if it must wait."""
        source = self._required_source()
        needed = source.needs_on_host(place.name)
        while needed > (free := source.host_free()):
            loaded, idle = self._offloaded(), [one for one in self._idle() if one.offloaded_bytes]
            if not loaded or needed > free + _locked_at_most(loaded):
                raise ModelTooLarge.on_host(place.name, needed, free)
            if (lacking := needed - free - _locked_at_most(idle)) > 0:
                # Nothing is unloaded yet, since that would not be enough.
                self._ask_to_give_way(place, lacking, lambda one: _locked_at_most([one]))
                return False
            if not self._unload(idle[0]):
                return False
        return True

    def _offloaded(self) -> list[_ShelfEntry]:
        """Loaded models with weights in host memory beside their device."""
        with self._wake:
            return [one for one in self._places.values() if one.offloaded_bytes]

    def _idle(self) -> list[_ShelfEntry]:
        """Loaded models without users, least recently used first."""
        with self._wake:
            idle = [one for one in self._places.values() if one.is_idle]
            return sorted(idle, key=lambda one: one.used_at)

    def _unloaded(self, place: _ShelfEntry) -> WeftError | None:
        """Unload a model on request; return why it stays, or None if it is not loaded now."""
        if place.model is None and not place.users:
            return None
        try:
            return None if self._unload(place) else ModelInUse(place.name)
        except WeftError as error:
            return copy(error)
        except Exception:
            log.exception("model %s could not be unloaded", place.name)
            sentence = f"Model {place.name!r} could not be unloaded; the server's log says why."
            return NotReady(sentence)

    def _unload(self, place: _ShelfEntry) -> bool:
        with self._wake:
            if place.model is None or not place.is_idle:
                return False
            model, place.model = place.model, None
        removed = False
        try:
            removed = self._engine.remove_model(place.name)
        finally:
            with self._wake:
                if removed:
                    place.memory_bytes, place.offloaded_bytes = 0, 0
                    place.loaded_since = None
                else:
                    place.model = model
        if removed:
            device = model.device
            model.adapters.forget()
            model.controls.forget()
            model.embeddings.forget()
            model.image_prompts.forget()
            del model
            reclaim(device)
            log.info("model %s is unloaded", place.name)
        return removed

    def _settle(self, place: _ShelfEntry, error: WeftError | None) -> None:
        with self._wake:
            loading, place.loading = place.loading, None
            if place in self._jobs:
                self._jobs.remove(place)
            for one in self._places.values():
                if one.gives_way_to is place:
                    one.gives_way_to = None
                    one.given_way.set_result(None)
        if loading is not None:
            loading.set_result(error)

    def _required_source(self) -> Source:
        if self._source is None:
            raise NotReady("No models are loaded on demand here.")
        return self._source

    def _loaded_bytes(self) -> int:
        with self._wake:
            weights = sum(one.memory_bytes for one in self._places.values())
        return weights + self._engine.recorded_bytes

    def _names(self) -> tuple[str, ...]:
        """Names of the default model, of others that are loaded, and of those of the source."""
        return self._names_with(self._created())

    def _names_with(self, found: Iterable[str]) -> tuple[str, ...]:
        with self._wake:
            held = [place.name for place in self._places.values() if place.model or place.loading]
            return tuple(dict.fromkeys((self._default, *held, *found)))

    def _created(self) -> Mapping[str, int]:
        return {} if self._source is None else self._source.created()

    def _place(self, name: str) -> _ShelfEntry:
        with self._wake:
            return self._places.setdefault(name, _ShelfEntry(name))

    def _state(self, name: str, created: int) -> ModelState:
        place = self._place(name)
        with self._wake:
            return ModelState(
                name=name,
                default=name == self._default,
                created=created,
                model=place.model,
                memory_bytes=place.memory_bytes,
                offloaded_bytes=place.offloaded_bytes,
                loaded_since=place.loaded_since,
                loading=None if place.loading is None else place.progress,
                prepared=PreparedForwards()
                if place.model is None
                else self._engine.prepared(place.model),
            )


def _locked_at_most(places: Iterable[_ShelfEntry]) -> int:
    """Maximum host memory that unloading frees: torch locks it in powers of two."""
    return 2 * sum(one.offloaded_bytes for one in places)


def _believed(place: _ShelfEntry) -> WeftError | None:
    """The error of a recent failed load, while it is assumed to hold."""
    if place.refusal is None or place.refusal[1] < time.monotonic():
        return None
    return place.refusal[0]


def _refusal(name: str, error: Exception) -> WeftError:
    """The error that clients get for an unexpected exception."""
    if is_out_of_memory(error):
        return NotReady(f"There is not enough memory for model {name!r}.", retry_after_s=60)
    return ModelMismatch(f"Model {name!r} could not be loaded; the server's log says why.")
