"""A PostgreSQL database (Debian's, started by the tests), shared by servers or unreachable."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, cast

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import InternalError
from starlette.testclient import TestClient
from torch import Tensor

from server.errors import JobsUnavailable
from server.http.app import create_app
from server.jobs import store
from server.jobs.database import PATIENCE, PROBE_S, Database, of_url
from server.jobs.job import ENDED
from server.jobs.watchdog import Watchdog
from server.models.inputs import RowInputs
from server.service.hosting import Hosted
from server.settings import Settings
from tests.server.jobs.test_store import KEEP_S, LEASE_S, new
from tests.server.toy_model import Toy, started

INPUT = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64, "guidance": "none"}
FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


class PostgreSQL:
    """A server of PostgreSQL with an empty database."""

    def __init__(self) -> None:
        # PostgreSQL does not run as root, and then cannot reach pytest's folders.
        user = "postgres" if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp())
        if user is not None:
            shutil.chown(self.folder, user)
        self.url = f"postgresql:///postgres?host={self.folder}&user=weft"
        self._quiet: dict[str, Any] = {
            "user": user,
            "stdout": subprocess.DEVNULL,
            "cwd": self.folder,
            "check": True,
        }
        programs, data = FOUND[-1].parent, self.folder / "data"
        setting_up = [programs / "initdb", "-D", data, "-A", "trust", "-U", "weft", "--no-sync"]
        subprocess.run(setting_up, **self._quiet)
        self._control = [programs / "pg_ctl", "-D", data, "-w", "-l", self.folder / "log"]

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        subprocess.run([*self._control, "-o", options, "start"], **self._quiet)

    def stop(self) -> None:
        subprocess.run([*self._control, "-m", "immediate", "stop"], **self._quiet)

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Stop all of its processes in a `with` block, while the kernel keeps its connections."""
        first = psutil.Process(
            int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        )
        stopped = [first, *first.children()]
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                process.resume()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    if not FOUND:
        pytest.skip("Debian's package postgresql is not installed")
    server = PostgreSQL()
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.folder)


def test_servers_share_jobs_and_each_is_begun_and_ended_once(postgresql: PostgreSQL) -> None:
    asyncio.run(_share(postgresql.url))


async def _share(url: str) -> None:
    # Both find an empty database.
    servers = await asyncio.gather(*(asyncio.to_thread(of_url, url) for _ in range(2)))
    try:
        await _one_key_is_one_job(*servers)
        await _each_is_begun_once(*servers)
    finally:
        for database in servers:
            database.close()


async def _one_key_is_one_job(one: Database, other: Database) -> None:
    posts = [
        database.run(store.add, new(key="k", webhook="https://x.example"), 100, 1.0)
        for _ in range(50)
        for database in (one, other)
    ]
    (identifier,) = {job.id for job in await asyncio.gather(*posts)}
    await one.run(store.cancel, "a", identifier, KEEP_S, 2.0)


async def _each_is_begun_once(one: Database, other: Database) -> None:
    told: dict[str, Any] = {"webhook": "https://x.example", "webhook_events": ("completed",)}
    accepted = [await one.run(store.add, new(owner, **told), 100, 1.0) for owner in "aabbaabb"]
    assert len(await other.run(store.positions, [job.id for job in accepted])) == len(accepted)

    async def begin(database: Database, worker: str) -> list[Any]:
        found: list[Any] = []
        while job := await database.run(store.begin, worker, LEASE_S, 3.0, ["a", "b"]):
            found.append(job)
        return found

    begun = list(chain(*await asyncio.gather(begin(one, "one"), begin(other, "other"))))
    assert Counter(job.id for job in begun) == Counter(job.id for job in accepted)
    again = await other.run(store.begin, "other", LEASE_S, 4.0 + LEASE_S, ["a", "b"])
    assert again is not None
    assert again.attempt == 2
    first = next(job for job in begun if job.id == again.id)
    ends = [
        database.run(store.finish, job, "succeeded", KEEP_S, 40.0, result={"attempt": job.attempt})
        for database, job in ((one, first), (other, again), (one, again))
    ]
    # The end of the latest attempt may be repeated; only one of the two tells of it, see below.
    assert await asyncio.gather(*ends) == [False, True, True]
    ended = await one.run(store.get, again.owner, again.id)
    assert ended.result == {"attempt": 2}
    due = await asyncio.gather(*(database.run(store.due, 50.0, 9) for database in (one, other)))
    assert [delivery.job.id for delivery in chain(*due)] == [again.id]
    await one.run(store.forget, [job.id for job in accepted])
    assert await other.run(store.page, "b", None, 9) == []


class Answer(NamedTuple):
    status: int
    retry_after: str | None
    body: Any


class Outage(NamedTuple):
    """What a server answered while its database was down, and afterwards.

    Attributes:
        during: answers while it was down, by request.
        log: log of this time, with tracebacks.
        after: answers once it was up again.
        ended: a job that was accepted before, and ended while it was down.
        events: data of that job's events, from a stream that began before.
    """

    during: dict[str, Answer]
    log: str
    after: dict[str, Answer]
    ended: Any
    events: str


class Gated(Toy):
    """A toy that draws only when it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Event()

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        assert self.allowed.wait(60)
        return super().evaluate(x, t, inputs)


@contextmanager
def serving(postgresql: PostgreSQL, pictures: Path) -> Generator[tuple[TestClient, Gated]]:
    """A server whose jobs are in this database, and its model."""
    toy = Gated()
    toy.allowed.set()
    engine, nowhere = started(toy, 8), cast("Any", None)
    settings = Settings.model_validate(
        {"jobs": {"database": postgresql.url, "pictures": str(pictures)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.http.app.host", lambda *_: Hosted(engine, {"toy": toy}, nowhere))
        with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
            until(lambda: client.get("/readyz").status_code == 200)
            yield client, toy
    engine.stop(0)


def processed(client: TestClient, toy: Gated) -> str:
    """Path of a job that is being processed until the model may draw."""
    toy.allowed.clear()
    path = client.post("/v1/predictions", json={"input": INPUT}).headers["location"]
    until(lambda: client.get(path).json()["status"] == "processing")
    return path


@pytest.fixture(scope="module")
def outage(postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Outage:
    with serving(postgresql, tmp_path_factory.mktemp("pictures")) as (client, toy):
        return _put_down(postgresql, client, toy)


def _put_down(postgresql: PostgreSQL, client: TestClient, toy: Gated) -> Outage:
    path = processed(client, toy)
    with logged() as log, ThreadPoolExecutor() as threads:
        events = threads.submit(lambda: client.get(f"{path}/events").text)
        until(lambda: watched(client))
        postgresql.stop()
        try:
            during = asked(client, path)
            toy.allowed.set()
            sleep(2.0)
            during |= {f"later {what}": one for what, one in asked(client, path).items()}
        finally:
            postgresql.start()
        said = log.getvalue()
        until(lambda: "degraded" not in client.get("/readyz").json())
        after = asked(client, path)
        until(lambda: client.get(path).json()["status"] in ENDED)
        return Outage(during, said, after, client.get(path).json(), events.result(60))


def watched(client: TestClient) -> Any:
    """The jobs whose events are being read."""
    app: Any = client.app
    return app.state.jobs.watches._watches


def asked(client: TestClient, path: str) -> dict[str, Answer]:
    answers = {
        "post": client.post("/v1/predictions", json={"input": INPUT}),
        "get": client.get(path),
        "list": client.get("/v1/predictions"),
        "cancel": client.post(f"/v1/predictions/{'0' * 32}/cancel"),
        "ready": client.get("/readyz"),
        "generate": client.post("/v1/generate", json={}),
    }
    return {
        what: Answer(one.status_code, one.headers.get("retry-after"), one.json())
        for what, one in answers.items()
    }


def until(happened: Callable[[], Any]) -> None:
    last = monotonic() + 60
    while not happened():
        assert monotonic() < last
        sleep(0.02)


@contextmanager
def logged() -> Generator[io.StringIO]:
    """Everything logged in a `with` block, formatted with tracebacks."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    yield text
    logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize("what", ["post", "get", "list", "cancel", "later post"])
def test_without_its_database_a_job_s_route_asks_to_try_again(outage: Outage, what: str) -> None:
    answer = outage.during[what]
    assert (answer.status, answer.body["error"]["code"]) == (503, "predictions_unavailable")
    assert answer.body["error"]["message"] == (
        "The database of durable jobs cannot be used now; try again later."
    )
    assert answer.retry_after == "5"


def test_without_its_database_the_log_has_one_line(outage: Outage) -> None:
    (line,) = outage.log.splitlines()
    assert line.startswith("ERROR durable jobs: the database cannot be used, and is tried again: ")


def test_without_the_jobs_database_a_server_is_ready_and_names_what_is_not(outage: Outage) -> None:
    for what in ("ready", "later ready"):
        degraded = {"predictions": "The database of durable jobs cannot be reached."}
        assert outage.during[what].body == {"status": "ready", "degraded": degraded}
        assert outage.during[what].status == 200
    assert outage.after["ready"].body == {"status": "ready"}


def test_once_its_database_is_back_jobs_are_accepted_and_shown(outage: Outage) -> None:
    statuses = {what: answer.status for what, answer in outage.after.items()}
    assert statuses["post"] == 202
    assert statuses["get"] == statuses["list"] == 200
    assert statuses["cancel"] == 404


def test_a_job_that_ends_while_the_database_is_down_has_its_images_afterwards(
    outage: Outage,
) -> None:
    assert (outage.ended["status"], outage.ended["attempts"]) == ("succeeded", 1)


def test_events_of_a_job_go_on_after_the_database_was_down(outage: Outage) -> None:
    assert '"status":"succeeded"' in outage.events.rpartition("event: status")[2]


def test_a_server_stops_in_order_without_its_database(
    postgresql: PostgreSQL, tmp_path: Path
) -> None:
    with logged() as log:
        with serving(postgresql, tmp_path) as (client, toy):
            processed(client, toy)
            postgresql.stop()
            toy.allowed.set()
        postgresql.start()
    assert "Traceback" not in log.getvalue()


def test_no_statement_is_prepared_on_a_connection(postgresql: PostgreSQL) -> None:
    """Another transaction may get another connection, through PgBouncer."""

    def prepared(connection: Connection) -> int:
        return connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()

    async def run() -> None:
        for _ in range(10):
            await database.run(store.counts)
        assert await database.run(prepared) == 0

    database = of_url(postgresql.url)
    try:
        asyncio.run(run())
    finally:
        database.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of half a second for a transaction, and of two seconds for a connection."""
    monkeypatch.setattr("server.jobs.database.Watchdog", partial(Watchdog, longest_s=0.5))
    monkeypatch.setitem(PATIENCE, "connect_timeout", "2")


@pytest.mark.usefixtures("impatient")
def test_a_frozen_database_fails_all_transactions_and_their_threads_serve_the_next(
    postgresql: PostgreSQL,
) -> None:
    async def run() -> None:
        database = await asyncio.to_thread(of_url, postgresql.url)
        asked = [partial(database.run, store.counts) for _ in range(20)]
        try:
            await asyncio.gather(*(ask() for ask in asked))
            with postgresql.frozen():
                async with asyncio.timeout(10):
                    ends = await asyncio.gather(*(ask() for ask in asked), return_exceptions=True)
            assert [type(end) for end in ends] == [JobsUnavailable] * len(ends)
            assert not database.reachable
            await asyncio.sleep(PROBE_S)
            await asked[0]()
            assert database.reachable
            await asyncio.gather(*(ask() for ask in asked))
        finally:
            database.close()

    asyncio.run(run())


@pytest.mark.usefixtures("impatient")
def test_a_statement_that_a_frozen_database_has_begun_ends_too(postgresql: PostgreSQL) -> None:
    database = of_url(postgresql.url)
    under_way = threading.Event()

    def sleeps(connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        under_way.set()
        connection.execute(text("SELECT pg_sleep(1)"))

    async def run() -> None:
        sleeping = asyncio.create_task(database.run(sleeps))
        await asyncio.to_thread(under_way.wait)
        with postgresql.frozen():
            async with asyncio.timeout(10):
                with pytest.raises(JobsUnavailable):
                    await sleeping

    try:
        asyncio.run(run())
    finally:
        database.close()


@pytest.mark.usefixtures("impatient")
def test_a_server_and_its_metrics_name_a_frozen_database(
    postgresql: PostgreSQL, tmp_path: Path
) -> None:
    with serving(postgresql, tmp_path) as (client, _):
        path = client.post("/v1/predictions", json={"input": INPUT}).headers["location"]
        with postgresql.frozen():
            until(lambda: "degraded" in client.get("/readyz").json())
            assert client.get(path).status_code == 503
            assert client.get("/readyz").status_code == 200
            assert measured(client)["weft_jobs_reachable", ""] == 0
        until(lambda: "degraded" not in client.get("/readyz").json())
        assert measured(client)["weft_jobs_reachable", ""] == 1
        until(lambda: client.get(path).json()["status"] == "succeeded")


def test_the_metrics_count_jobs_by_status_and_time_transactions(
    postgresql: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.jobs.jobs.COUNT_S", 0.1)
    with serving(postgresql, tmp_path) as (client, toy):
        until(lambda: ("weft_jobs", "succeeded") in measured(client))
        before = measured(client)
        path = processed(client, toy)
        until(lambda: measured(client)["weft_jobs", "processing"] >= 1)
        toy.allowed.set()
        until(lambda: client.get(path).json()["status"] == "succeeded")
        ended = "weft_jobs", "succeeded"
        until(lambda: measured(client)[ended] > before[ended])
        after = measured(client)
    assert set(ENDED) < {label for name, label in after if name == "weft_jobs"}
    count = "weft_jobs_transaction_seconds_count", ""
    # The job was added, read, begun and ended.
    assert after[count] - before[count] >= 4


def measured(client: TestClient) -> dict[tuple[str, str], float]:
    """Metrics of jobs by name and label."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name.startswith("weft_jobs")
    }


def test_while_the_database_is_out_of_reach_only_one_transaction_at_a_time_tries_it() -> None:
    tries: list[None] = []

    def refuse() -> Any:
        tries.append(None)
        raise sqlite3.OperationalError("no route to host")

    async def run() -> None:
        database = Database(create_engine("sqlite://", creator=refuse), 1, alone=False)
        for _ in range(5):
            with pytest.raises(JobsUnavailable):
                await database.run(store.free_all)
        database.close()

    asyncio.run(run())
    assert len(tries) == 1


def test_a_database_that_may_only_be_read_is_out_of_reach() -> None:
    """As after a failover, on the server that has become a standby."""

    class ReadOnly(Exception):
        sqlstate = "25006"

    def write(_: Connection) -> None:
        raise InternalError("INSERT", {}, ReadOnly("read-only transaction"))

    async def run() -> None:
        database = Database(create_engine("sqlite://"), 1, alone=False)
        with pytest.raises(JobsUnavailable):
            await database.run(write)
        database.close()

    asyncio.run(run())
