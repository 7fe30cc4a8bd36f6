"""The connection to the database, used outside of the event loop."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from alembic.command import upgrade
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import StaticPool

from server.errors import JobsUnavailable, NotReady
from server.jobs.watchdog import Watchdog
from server.latencies import Latencies

__all__ = ["Database", "of_folder", "of_url"]

log = logging.getLogger("weft")

Given = ParamSpec("Given")
Result = TypeVar("Result")

PRAGMAS: Final = ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "foreign_keys=ON")
"""With these, a transaction is on the disk before it is acknowledged."""

FILE: Final = "jobs.sqlite"
CONNECTIONS: Final = 4
"""Number of connections to PostgreSQL."""

PATIENCE: Final = {"connect_timeout": "5", "tcp_user_timeout": "10000"}
"""Seconds for a connection to PostgreSQL, and milliseconds for an acknowledgement of what was sent;
by default libpq and the kernel wait for minutes. Parameters of the URL take precedence."""

PROBE_S: Final = 2.0
"""Seconds between attempts to reach a PostgreSQL that could not be reached; transactions between
them fail at once, instead of waiting for a connection one after another."""

BOUNDS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Bounds of the histogram of transactions, in seconds."""

SAY_S: Final = 60.0
"""Seconds for which the log does not repeat that the database cannot be used."""

READ_ONLY: Final = "25006"
"""PostgreSQL's code of a transaction that may not write, as on a standby server."""

MIGRATING: Final = 0x77656674
"""Key of PostgreSQL's lock, which lets only one of several servers migrate."""


class Database:
    """Runs transactions in threads.

    Args:
        engine: engine of SQLAlchemy.
        threads: number of concurrent transactions.
        lock: descriptor of an open file whose lock is held; -1 without one.
        alone: whether no other process uses the database.
        watchdog: bounds the time of each transaction; None if that is not necessary.

    Attributes:
        reachable: whether PostgreSQL answered the last transaction; always true for SQLite.
        seconds: times of transactions, from the call until they were on the disk or had failed.
    """

    def __init__(
        self,
        engine: Engine,
        threads: int,
        lock: int = -1,
        *,
        alone: bool,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.alone = alone
        self.reachable = True
        self.seconds = Latencies(BOUNDS_S)
        self._watching = nullcontext if watchdog is None else watchdog.watching
        self._probe_at = 0.0
        self._say_at = 0.0
        self._engine = engine
        self._lock = lock
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="jobs")

    async def run(
        self,
        work: Callable[Concatenate[Connection, Given], Result],
        *given: Given.args,
        **named: Given.kwargs,
    ) -> Result:
        """Run `work` as a transaction; return its result once the transaction is on the disk.

        Once begun, a transaction runs to its end, even if its caller gives up waiting.

        Raises:
            JobsUnavailable: the database cannot be reached, or cannot store anything now.
        """
        began = time.monotonic()
        probes = not self.reachable
        if probes:
            if began < self._probe_at:
                raise JobsUnavailable
            self._probe_at = began + PROBE_S

        def transaction() -> Result:
            if not (self.reachable or probes):
                # An earlier transaction has found that out while this one waited for a thread.
                raise JobsUnavailable
            with self._watching(), self._engine.begin() as connection:
                return work(connection, *given, **named)

        try:
            done = await asyncio.get_running_loop().run_in_executor(self._threads, transaction)
        except DBAPIError as error:
            if not _unusable(error):
                raise
            self._note(error)
            raise JobsUnavailable from error
        finally:
            self.seconds.add(time.monotonic() - began)
        if not self.reachable:
            self.reachable = True
            log.info("durable jobs: the database is reachable again")
        return done

    def _note(self, error: DBAPIError) -> None:
        now = time.monotonic()
        if not self.alone and _unanswered(error):
            self.reachable = False
            self._probe_at = now + PROBE_S
        if now >= self._say_at:
            self._say_at = now + SAY_S
            reason = str(error.orig).partition("\n")[0]
            log.error("durable jobs: the database cannot be used, and is tried again: %s", reason)

    def close(self) -> None:
        """Close the connections, after the running transactions."""
        self._threads.shutdown()
        self._engine.dispose()
        if self._lock >= 0:
            os.close(self._lock)


def of_folder(folder: Path) -> Database:
    """Open the SQLite database of a folder, which this process has to itself.

    All transactions run one after another through one connection. SQLite 3.7.0 to 3.51.2 can
    corrupt a database in WAL mode that several connections write and checkpoint at once
    (https://sqlite.org/wal.html#walresetbug), and Python 3.11 comes with such a version.

    Raises:
        NotReady: another server uses the folder.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise NotReady(f"jobs.folder is {str(folder)!r}, which another server uses.") from None
    file = folder / FILE
    _make_private(file)
    engine = create_engine(
        f"sqlite:///{file}",
        poolclass=StaticPool,
        connect_args={"check_same_thread": False},
        # Prompts must not appear in the log.
        hide_parameters=True,
        json_deserializer=_stored,
    )
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    _migrate(engine)
    return Database(engine, 1, lock, alone=True)


def of_url(url: str) -> Database:
    """Open a PostgreSQL database, which several servers may share."""
    given = make_url(url).set(drivername="postgresql+psycopg")
    engine = create_engine(
        given.set(query={**PATIENCE, **given.query}),
        pool_size=CONNECTIONS,
        pool_pre_ping=True,
        # PgBouncer may give each transaction another connection, which does not know statements
        # that were prepared on the one before.
        connect_args={"prepare_threshold": None},
        hide_parameters=True,
        json_deserializer=_stored,
    )
    watchdog = Watchdog(engine)
    _migrate(engine)
    return Database(engine, CONNECTIONS, alone=False, watchdog=watchdog)


def _make_private(file: Path) -> None:
    """Let only this user read a database, whatever the umask; SQLite's other files follow it."""
    for path in (file, *file.parent.glob(f"{file.name}-*")):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        except PermissionError:
            # It belongs to another user, or its file system has no permissions.
            log.warning("durable jobs: the permissions of %s cannot be changed to 0600", path)
        finally:
            os.close(descriptor)


def _unusable(error: DBAPIError) -> bool:
    """Whether the database is to blame, rather than the statement."""
    if isinstance(error, InterfaceError | OperationalError):
        return True
    return _state_of(error) == READ_ONLY


def _unanswered(error: DBAPIError) -> bool:
    """Whether PostgreSQL did not answer, or answered that it is shutting down or starting."""
    state = _state_of(error)
    return state is None or state.startswith("57P")


def _state_of(error: DBAPIError) -> str | None:
    """PostgreSQL's code of an error; None if it did not answer, and for SQLite."""
    return getattr(error.orig, "sqlstate", None)


def _stored(text: str) -> Any:
    """Parse the JSON of a column; None if it is damaged, which must not block other jobs."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(data: bytes) -> str:
    """Decode the text of a column; an empty text if it is damaged."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _prepare(connection: Any, _: Any) -> None:
    connection.text_factory = _text
    # Python's module would not begin a transaction before schema changes.
    connection.isolation_level = None
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATING})
        config.attributes["connection"] = connection
        try:
            upgrade(config, "head")
        except CommandError as error:
            raise NotReady(
                f"the database of jobs does not belong to this version of Weft: {error}."
            ) from None
