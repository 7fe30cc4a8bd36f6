"""Models are loaded when a request names them, and unloaded where memory is short."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from threading import Event
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
import torch
from starlette.requests import Request
from torch import nn

from server.engine.engine import Engine
from server.engine.preparation import Preparation
from server.errors import (
    Cancelled,
    ModelInUse,
    ModelMismatch,
    ModelTooLarge,
    NotReady,
    UnknownModel,
    WeftError,
)
from server.http.automatic1111.checkpoints import Checkpoints
from server.http.automatic1111.jobs import owner_of
from server.http.automatic1111.weights import reload_checkpoint, unload_checkpoint
from server.models.hosted import HostedModel
from server.requests.schema import GenerateRequest
from server.service.generation import Generation
from server.service.model_shelf import MemoryBudget, ModelShelf
from server.service.service import Service
from server.service.streams import Streams
from server.settings import Limits, Settings
from tests.server.full_ticks import full_ticks
from tests.server.toy_model import Toy, started

BYTES = 4000
"""Size of each model; there is memory for two of them."""

PATIENCE_S = 30


class Weighty(Toy):
    """A toy with weights."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self._weights = nn.Linear(BYTES // 4, 1, bias=False)

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self._weights}


class Store:
    """A store of toys: "slow" waits for a signal, "big" and "broken" cannot be loaded."""

    def __init__(self) -> None:
        self.may_load = Event()
        self.loading = Event()
        self.loads: list[str] = []

    def created(self) -> Mapping[str, int]:
        return dict.fromkeys(("a", "b", "c", "slow", "big", "broken", "failing"), 7)

    def needs(self, name: str) -> int:
        return 3 * BYTES if name == "big" else BYTES

    def needs_on_host(self, name: str) -> int:
        return 0

    def host_free(self) -> int:
        return BYTES

    def room(self, loaded_bytes: int) -> MemoryBudget:
        return MemoryBudget(2 * BYTES - loaded_bytes, 2 * BYTES)

    def load(self, name: str, on_progress: Callable[[int, int], None]) -> HostedModel:
        self.loads.append(name)
        on_progress(1, 4)
        if name == "broken":
            raise ModelMismatch("Model 'broken' has no unet.")
        if name == "failing":
            raise OSError("/secret/failing is gone")
        if name == "slow":
            self.loading.set()
            assert self.may_load.wait(PATIENCE_S)
        return Weighty(name)


@pytest.fixture(scope="module")
def engine(young_garbage: None) -> Iterator[Engine]:
    made = started(Weighty("a"), 8)
    # The cost of forwards of an added model does not matter here.
    with full_ticks():
        yield made
    made.stop(0)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def service(engine: Engine, store: Store) -> Iterator[Service]:
    """A service with the model "a" loaded."""
    for name in store.created():
        if name != "a" and name in engine._models:
            engine.remove_model(name)
    if "a" not in engine._models:
        engine.add_model(Weighty("a"))
    made = Service(Limits(steps=200), load_s=PATIENCE_S)
    made.open(engine, {"a": engine._models["a"]}, store)
    yield made
    made.abandon()
    made.close()


async def made(service: Service, model: str | None, identifier: str = "", **fields: Any) -> Any:
    """The pixels of an image."""
    generation = await begun(service, model, identifier, **fields)
    try:
        while not generation.done:
            await generation.news()
        return generation.results[0].pixels
    finally:
        service.release(generation)


async def begun(
    service: Service, model: str | None, identifier: str = "", **fields: Any
) -> Generation:
    body = {"prompt": "x", "steps": 2, "seed": 1, "model": model} | fields
    request = GenerateRequest.model_validate(body)
    return await service.admit(request, identifier or f"for {model}")


def loaded(service: Service) -> list[str]:
    return [state.name for state in service.model_states() if state.model is not None]


def test_a_model_is_loaded_by_the_first_request_that_names_it(
    service: Service, store: Store
) -> None:
    assert [state.name for state in service.model_states()] == list(store.created())
    assert loaded(service) == ["a"]

    async def run() -> list[Any]:
        return await asyncio.gather(*(made(service, "b", f"{i}") for i in range(3)))

    first, second, third = asyncio.run(run())
    assert store.loads == ["b"]
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)
    assert np.array_equal(first, asyncio.run(made(service, None)))
    state = service.model_states()[1]
    assert (state.name, state.default, state.memory_bytes) == ("b", False, BYTES)
    assert state.loaded_since is not None


def test_the_least_recently_used_model_goes_where_memory_is_short(
    service: Service, store: Store, engine: Engine
) -> None:
    gone = weakref.ref(service.ready_shelf().loaded()[0])
    engine_knew = set(engine._models)
    asyncio.run(made(service, "b"))
    asyncio.run(made(service, "c"))
    assert loaded(service) == ["b", "c"]
    # Nothing keeps any part of the unloaded model.
    assert gone() is None
    assert "a" in engine_knew
    assert all(name != "a" for name, _, _ in engine.tick_costs())
    assert all(lane.model.facts.name != "a" for lane in engine._lanes)
    asyncio.run(made(service, "b"))
    asyncio.run(made(service, None))
    assert loaded(service) == ["a", "b"]
    assert store.loads == ["b", "c", "a"]


def test_ticks_go_on_while_a_model_is_loaded_and_its_progress_is_told(
    service: Service, store: Store
) -> None:
    async def run() -> None:
        waiting = asyncio.ensure_future(made(service, "slow"))
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        for i in range(3):
            await made(service, "a", f"{i}")
        [state] = [state for state in service.model_states() if state.name == "slow"]
        assert (state.loading, state.model) == (0.25, None)
        assert not waiting.done()
        store.may_load.set()
        await waiting

    asyncio.run(run())


def test_a_model_in_use_is_never_unloaded_and_the_request_waits(service: Service) -> None:
    async def run() -> None:
        held = await begun(service, "a", steps=100)
        other = await begun(service, "b", steps=100)
        waiting = asyncio.ensure_future(made(service, "c"))
        await asyncio.sleep(0.5)
        assert loaded(service) == ["a", "b"]
        assert not waiting.done()
        service.release(other)
        await waiting
        assert loaded(service) == ["a", "c"]
        service.release(held)

    asyncio.run(run())


def until(happened: Callable[[], bool]) -> None:
    last = monotonic() + PATIENCE_S
    while not happened():
        assert monotonic() < last
        sleep(0.01)


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.service.model_shelf.WAITED_S", 0.1)
    monkeypatch.setattr("server.service.model_shelf.MIN_TURN_S", 0.1)


@asynccontextmanager
async def in_use(shelf: ModelShelf, name: str) -> AsyncGenerator[Counter[str]]:
    """A model with a new lease before each old one ends, and how many leases there were."""
    leases, used = Counter[str](), asyncio.Event()

    async def use(after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            with await shelf.lend(name):
                leases[name] += 1
                used.set()
                await asyncio.sleep(0.2)

    users = [asyncio.create_task(use(after_s)) for after_s in (0.0, 0.1)]
    await used.wait()
    yield leases
    for user in users:
        user.cancel()
    await asyncio.gather(*users, return_exceptions=True)


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize("times", [1, 2])
def test_models_that_are_always_in_use_take_turns_with_one_that_waits(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """One that needs the room of both waits for both."""
    monkeypatch.setattr(store, "needs", lambda name: times * BYTES if name == "c" else BYTES)
    shelf = service.ready_shelf()

    async def run() -> None:
        async with in_use(shelf, "a") as of_a, in_use(shelf, "b") as of_b:
            async with asyncio.timeout(PATIENCE_S):
                (await shelf.lend("c")).release()
            had = of_a + of_b
            more = 2  # A request that had begun before may have ended since.
            await asyncio.to_thread(
                until, lambda: all((of_a + of_b)[name] > had[name] + more for name in "ab")
            )

    asyncio.run(run())


@pytest.mark.usefixtures("short_turns")
def test_the_model_of_a_stream_gives_way_to_none_and_another_does(service: Service) -> None:
    shelf = service.ready_shelf()

    async def run() -> None:
        stream = await shelf.lend("a", live=True)
        async with in_use(shelf, "b"):
            lease = await shelf.lend("c")
            assert loaded(service) == ["a", "c"]
            # Its users are not held back by one that needs another model's room.
            (await shelf.lend("a")).release()
            lease.release()
        stream.release()
        assert {place.live for place in shelf._places.values()} == {0}

    asyncio.run(run())


@pytest.mark.usefixtures("short_turns")
def test_users_of_a_model_that_gives_way_in_vain_get_it_back(
    service: Service, store: Store
) -> None:
    shelf = service.ready_shelf()

    async def run() -> None:
        stream = await shelf.lend("a", live=True)
        held = await shelf.lend("b")
        waiting = asyncio.create_task(shelf.lend("c"))
        await asyncio.to_thread(until, lambda: shelf._place("b").gives_way_to is not None)
        late = asyncio.create_task(shelf.lend("b"))
        await asyncio.sleep(0.5)
        assert not late.done()
        waiting.cancel()
        async with asyncio.timeout(PATIENCE_S):
            (await late).release()
        held.release()
        stream.release()

    asyncio.run(run())
    assert store.loads == ["b"]


@pytest.mark.usefixtures("short_turns")
def test_models_in_use_do_not_give_way_to_one_that_failed_to_load(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = service.ready_shelf()
    monkeypatch.setattr("server.service.model_shelf.FAILURE_EXPIRY_S", 0.0)

    async def run() -> None:
        with pytest.raises(ModelMismatch):
            await shelf.lend("broken")
        async with in_use(shelf, "a"), in_use(shelf, "b"):
            monkeypatch.setattr(shelf, "_patience_s", 2.0)
            with pytest.raises(NotReady, match="the models in use leave no room"):
                await shelf.lend("broken")

    asyncio.run(run())
    assert store.loads == ["broken", "b"]


def test_recordings_of_forwards_make_room_where_models_in_use_cannot(
    service: Service, engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [BYTES]
    preparation = Preparation()
    monkeypatch.setattr(Preparation, "recorded_bytes", property(lambda _: sum(held)))
    monkeypatch.setattr(preparation, "release", lambda: bool(held) and bool(held.pop()))
    monkeypatch.setattr(engine._idle_work, "_preparation", preparation)

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S / 2):
            with await service.ready_shelf().lend("a"):
                await made(service, "b")

    asyncio.run(run())
    assert loaded(service) == ["a", "b"]


def test_host_memory_that_a_model_needs_beside_its_device_is_found_or_it_is_refused(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = service.ready_shelf()
    on_host = {"b": BYTES, "c": BYTES}
    monkeypatch.setattr(store, "needs_on_host", lambda name: on_host.get(name, 0))
    kept = "server.service.model_shelf.offloaded_bytes_of"
    monkeypatch.setattr(kept, lambda one: on_host.get(one.facts.name, 0))

    def free() -> int:
        held = [state.offloaded_bytes for state in shelf.states()]
        return BYTES - sum(held)

    monkeypatch.setattr(store, "host_free", free)
    asyncio.run(made(service, "b"))
    asyncio.run(made(service, "c"))
    assert loaded(service) == ["a", "c"], "b had to go, though the device had room"
    on_host["slow"] = 3 * BYTES
    with pytest.raises(
        ModelTooLarge, match=r"needs 12000 bytes of host memory .* 0 bytes are free"
    ):
        asyncio.run(made(service, "slow"))
    assert store.loads == ["b", "c"]
    assert loaded(service) == ["a", "c"], "nothing goes for what cannot fit"


@pytest.mark.usefixtures("short_turns")
def test_models_that_are_always_in_use_take_turns_in_host_memory_too(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models with parts in host memory there may be room on the device for all."""
    shelf = service.ready_shelf()

    def on_host(name: str) -> int:
        return BYTES if name in {"b", "c"} else 0

    def free() -> int:
        return BYTES - sum(state.offloaded_bytes for state in shelf.states())

    room = MemoryBudget(4 * BYTES, 4 * BYTES)
    monkeypatch.setattr(store, "room", lambda *_: room)
    monkeypatch.setattr(store, "needs_on_host", on_host)
    monkeypatch.setattr(store, "host_free", free)
    kept = "server.service.model_shelf.offloaded_bytes_of"
    monkeypatch.setattr(kept, lambda one: on_host(one.facts.name))

    async def run() -> None:
        async with in_use(shelf, "a"), in_use(shelf, "b"), asyncio.timeout(PATIENCE_S):
            (await shelf.lend("c")).release()
            assert "a" in loaded(service), "its room would not help"

    asyncio.run(run())


def test_who_waits_too_long_is_told_what_for(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = service.ready_shelf()

    async def run() -> None:
        in_use = "'c' is not loaded after 0 s: the models in use"
        with await shelf.lend("a"), await shelf.lend("b"), monkeypatch.context() as patched:
            patched.setattr(shelf, "_patience_s", 0.3)
            with pytest.raises(NotReady, match=in_use):
                await shelf.lend("c")
        # Nobody waits for it any more, so it must not be loaded later.
        await asyncio.sleep(0.5)
        assert "c" not in store.loads
        lending = asyncio.create_task(shelf.lend("slow"))
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        monkeypatch.setattr(shelf, "_patience_s", 0.3)
        with pytest.raises(NotReady, match="'slow' is still being loaded"):
            await shelf.lend("slow")
        store.may_load.set()
        (await lending).release()

    asyncio.run(run())


def test_a_model_larger_than_the_memory_is_refused_in_bytes_before_it_is_read(
    service: Service, store: Store
) -> None:
    with pytest.raises(ModelTooLarge, match=rf"'big' needs {3 * BYTES} bytes .* {2 * BYTES} bytes"):
        asyncio.run(made(service, "big"))
    assert store.loads == []
    assert loaded(service) == ["a"]


def test_a_model_that_cannot_be_loaded_is_nobody_elses_trouble(
    service: Service, store: Store
) -> None:
    async def run() -> list[Any]:
        requests = (made(service, "broken", f"{i}") for i in range(2))
        return await asyncio.gather(*requests, made(service, "a"), return_exceptions=True)

    *refused, picture = asyncio.run(run())
    assert [str(error) for error in refused] == ["Model 'broken' has no unet."] * 2
    assert all(isinstance(error, ModelMismatch) for error in refused)
    assert isinstance(picture, np.ndarray)
    with pytest.raises(ModelMismatch):
        asyncio.run(made(service, "broken"))
    # Its files are not read again for every request.
    assert store.loads == ["broken"]


def test_what_a_library_says_of_a_file_is_not_told(service: Service) -> None:
    with pytest.raises(ModelMismatch) as refused:
        asyncio.run(made(service, "failing"))
    assert "secret" not in refused.value.message


def test_a_name_of_no_model_is_refused_at_once(service: Service) -> None:
    with pytest.raises(UnknownModel, match="allowed are: a, b, big, broken"):
        asyncio.run(made(service, "d"))


def test_looking_for_a_model_on_a_slow_disk_holds_up_nothing_else(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Event()

    def slow() -> Mapping[str, int]:
        assert answers.wait(PATIENCE_S)
        return {"b": 0}

    monkeypatch.setattr(store, "created", slow)

    async def run() -> None:
        waiting = asyncio.ensure_future(made(service, "b"))
        await asyncio.sleep(0)
        picture = await made(service, "a")
        assert picture is not None
        assert not waiting.done()
        answers.set()
        await waiting

    asyncio.run(run())


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_who_waits_hears_of_a_cancellation_and_of_the_end(
    service: Service, store: Store, end: str
) -> None:
    async def run() -> WeftError:
        waiting = asyncio.ensure_future(made(service, "slow", "it"))
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        if end == "cancel":
            service.cancel("it")
        else:
            service.drain()
            service.abandon()
        with pytest.raises(WeftError) as ended:
            await asyncio.wait_for(waiting, PATIENCE_S)
        return ended.value

    ended = asyncio.run(run())
    store.may_load.set()
    assert isinstance(ended, Cancelled if end == "cancel" else NotReady)


def test_whoever_waits_for_a_model_hears_at_once_that_the_engine_failed(
    service: Service, store: Store, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for a request, and for the settings of a stream."""

    async def run() -> None:
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(begun(service, "slow", "one")),
            asyncio.create_task(service.ready_shelf().lend("slow")),
        ]
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        # If requested earlier, it might get its turn first.
        waiting.append(asyncio.create_task(service.ready_shelf().unload("a")))
        await asyncio.sleep(0.01)
        monkeypatch.setattr(engine, "failure", RuntimeError())
        service.abandon()
        for one in waiting:
            with pytest.raises(NotReady, match=r"^The engine stopped: RuntimeError\.$"):
                await asyncio.wait_for(one, PATIENCE_S / 2)
        store.may_load.set()

    asyncio.run(run())


def test_a_request_that_is_cancelled_as_it_gets_its_model_gives_it_back(service: Service) -> None:
    async def leave(turns: int) -> None:
        request = GenerateRequest(prompt="x", steps=1)
        admitted = asyncio.create_task(service.admit(request, "leaving"))
        for _ in range(turns):
            await asyncio.sleep(0)
        admitted.cancel()
        with suppress(asyncio.CancelledError):
            service.release(await admitted)

    for turns in range(12):
        asyncio.run(leave(turns))
    assert {place.users for place in service.ready_shelf()._places.values()} == {0}


def test_the_model_of_an_open_stream_stays(service: Service) -> None:
    async def run() -> None:
        session = Streams(service, Settings()).open()
        await session.change({"prompt": "x", "model": "b"})
        await made(service, "c")
        assert loaded(service) == ["b", "c"]
        await session.change({"model": "c"})
        await made(service, "a")
        assert loaded(service) == ["a", "c"]
        session.close()
        await made(service, "b")
        await made(service, "a")
        assert loaded(service) == ["a", "b"]

    asyncio.run(run())


def test_the_engine_keeps_a_model_while_it_has_images_of_it(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Toy.evaluate

    def slowly(model: Toy, *given: Any) -> Any:
        sleep(0.1)
        return evaluate(model, *given)

    monkeypatch.setattr(Toy, "evaluate", slowly)

    async def run() -> None:
        generation = await begun(service, "a", steps=200)
        assert not engine.remove_model("a")
        service.release(generation)

    asyncio.run(run())


def test_a_model_is_unloaded_on_demand_unless_it_is_in_use(service: Service, store: Store) -> None:
    shelf = service.ready_shelf()

    async def run() -> None:
        with await shelf.lend("b"):
            with pytest.raises(ModelInUse, match="Model 'b' is in use"):
                await shelf.unload("b")
            assert loaded(service) == ["a", "b"]
        await shelf.unload("b")
        await shelf.unload("b")
        await shelf.unload(None)
        assert loaded(service) == []
        await made(service, "b")
        assert loaded(service) == ["b"]
        with pytest.raises(UnknownModel):
            await shelf.unload("z")
        # A model that is being loaded for a request is also in use.
        waiting = asyncio.create_task(shelf.lend("slow"))
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        unloading = asyncio.create_task(shelf.unload("slow"))
        await asyncio.sleep(0)
        store.may_load.set()
        with pytest.raises(ModelInUse):
            await unloading
        (await waiting).release()
        service.close()
        with pytest.raises(NotReady, match="is stopping"):
            await shelf.unload("b")

    asyncio.run(run())
    assert store.loads == ["b", "b", "slow"]


@pytest.mark.parametrize("end", ["late", "left", "stop"])
def test_an_unload_that_was_refused_or_whose_client_left_takes_no_effect_later(
    service: Service, store: Store, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = service.ready_shelf()

    async def run() -> None:
        lending = asyncio.create_task(shelf.lend("slow"))
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        monkeypatch.setattr(shelf, "_patience_s", 0.05 if end == "late" else PATIENCE_S)
        unloading = asyncio.create_task(shelf.unload("a"))
        await asyncio.sleep(0.01)
        if end == "left":
            unloading.cancel()
        if end == "stop":
            service.close()
        with pytest.raises(asyncio.CancelledError if end == "left" else NotReady):
            await asyncio.wait_for(unloading, PATIENCE_S)
        monkeypatch.undo()
        store.may_load.set()
        if end == "stop":
            with pytest.raises(NotReady):
                await lending
        else:
            (await lending).release()
            # Its turn would have come before this one's.
            await shelf.unload("slow")

    asyncio.run(run())
    if end == "stop":
        assert shelf._thread is not None
        shelf._thread.join(PATIENCE_S)
    assert "a" in loaded(service)


def test_a_client_that_leaves_while_its_model_is_unloaded_ends_nothing_of_others(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = service.ready_shelf()
    removing, may_remove, remove = Event(), Event(), engine.remove_model
    left = asyncio.Event()

    async def receive() -> dict[str, str]:
        await left.wait()
        return {"type": "http.disconnect"}

    def slow(name: str) -> bool:
        removing.set()
        return may_remove.wait(PATIENCE_S) and remove(name)

    async def run() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(engine, "remove_model", slow)
            patched.setattr(shelf, "_patience_s", 0.01)
            request = Request({"type": "http", "state": {}}, receive)
            unloading = asyncio.create_task(unload_checkpoint(request, service, Checkpoints()))
            await asyncio.to_thread(removing.wait, PATIENCE_S)
            await asyncio.sleep(0.05)
            left.set()
            await asyncio.wait_for(unloading, PATIENCE_S)
            may_remove.set()
        (await shelf.lend("b")).release()

    asyncio.run(run())
    assert loaded(service) == ["b"]


def test_a_model_whose_client_has_left_before_its_turn_is_not_loaded(
    service: Service, store: Store
) -> None:
    left, checkpoints = asyncio.Event(), Checkpoints()

    async def receive() -> dict[str, str]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        shelf = service.ready_shelf()
        lending = asyncio.create_task(shelf.lend("slow"))
        await asyncio.to_thread(store.loading.wait, PATIENCE_S)
        request = Request({"type": "http", "state": {}}, receive)
        checkpoints.choose(owner_of(request), "b")
        loading = asyncio.create_task(reload_checkpoint(request, service, checkpoints))
        await asyncio.sleep(0.01)
        left.set()
        try:
            await asyncio.wait_for(loading, PATIENCE_S / 2)
        finally:
            store.may_load.set()
            (await lending).release()
        # Its turn comes after that of the previous one.
        (await shelf.lend("c")).release()

    asyncio.run(run())
    assert store.loads == ["slow", "c"]


def test_no_cuda_graph_is_recorded_while_a_model_is_unloaded_on_demand(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving memory back to the system would spoil the recording."""
    stood_still: list[bool] = []

    def reclaim(_: torch.device) -> None:
        stood_still.append(engine._idle_work._undisturbed.locked())

    monkeypatch.setattr("server.service.model_shelf.reclaim", reclaim)
    asyncio.run(service.ready_shelf().unload("a"))
    assert stood_still == [True]


def test_a_model_that_could_not_come_back_is_not_unloaded(service: Service, engine: Engine) -> None:
    assert loaded(service) == ["a"]
    alone = Service(Limits())
    alone.open(engine, {"a": engine._models["a"]})
    with pytest.raises(NotReady, match="No models are loaded on demand here"):
        asyncio.run(alone.ready_shelf().unload("a"))
    assert loaded(alone) == ["a"]
    alone.close()
