"""The store's tables, and how a connection is opened. All that depends on the database's kind stands here.

One row of `moe_supervisor` always exists: a lease that is free is a row without a holder, so that there is always
something to lock.
"""

import os
import sqlite3
import tempfile
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Dialect,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from llama_stack_provider_moe.errors import InvalidInput

SCHEMA_VERSION = 4
BUSY_TIMEOUT_S = 15
# Any number of ours will do; every process that opens the store must use the same one.
_POSTGRES_SCHEMA_LOCK = 0x6D6F65


class UtcDateTime(TypeDecorator[datetime]):
    """Aware times, in UTC; SQLite has no time zones and keeps the same instant without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database."""
        if value is None:
            return None
        assert value.tzinfo is not None, "times of the store are aware"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


METADATA = MetaData()

schema_table = Table("moe_schema", METADATA, Column("version", Integer, primary_key=True, autoincrement=False))

jobs_table = Table(
    "moe_jobs",
    METADATA,
    # The order of submission; times may be equal, or jump.
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("owner", String(256), nullable=False),
    Column("recipe", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("scheduled_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("cancel_requested_at", UtcDateTime),
    Column("attempts", Integer, nullable=False, default=0),
    Column("reason", Text),
    Column("artifacts", Text, nullable=False, default="[]"),
    Column("supervisor", String(256)),
    Column("pid", Integer),
    Column("pid_birth", Double),
    Column("folder", Text, nullable=False),
    Column("queued_at", UtcDateTime, nullable=False),
    Column("lost", Integer, nullable=False, default=0),
    Column("stopped_by", String(64)),
    Column("gpus", Integer),
    Column("devices", Text),
    # Its place in the queue, see `queue`; counted, for the same reason as `seq`.
    Column("turn", Integer, nullable=False),
    Column("parent", String(128)),  # id of the job that this one exports
    Column("executor", String(16)),  # where it runs; null: on the supervisor's machine
    Column("run", String(128)),  # its name on a cluster
    Index("moe_jobs_state_owner_turn", "state", "owner", "turn"),
    Index("moe_jobs_owner_started_at", "owner", "started_at"),
    Index("moe_jobs_ended_at", "ended_at"),
    Index("moe_jobs_state_seq", "state", "seq"),
    Index("moe_jobs_owner_seq", "owner", "seq"),
    Index("moe_jobs_parent", "parent"),
    sqlite_autoincrement=True,
)

supervisor_table = Table(
    "moe_supervisor",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("holder", String(256)),
    Column("pid", Integer),
    Column("beat_at", UtcDateTime),
    Column("lease_s", Double),
    Column("turns", Integer, nullable=False, server_default="0"),  # given out so far
)


def open_engine(url: str) -> Engine:
    """An engine for `url`, its schema made, migrated or checked.

    SQLite gets its folder (0700) and file (0600), WAL, foreign keys and a busy timeout. Transactions of an engine
    made by `engine.execution_options(writes=True)` take SQLite's write lock when they begin: one that reads first
    and asks for the lock later is refused at once when another wrote in between, whatever the busy timeout.

    Tables of an older version are migrated, in the transaction that finds them.

    Raises:
        InvalidInput: `url` is no SQLAlchemy URL, names a database that lives in one process's memory, or holds a
            schema of a newer version of this package.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidInput("store_url", url, "an SQLAlchemy URL, such as 'sqlite:////path/jobs.db'") from None
    if parsed.get_backend_name() != "sqlite":
        # Whatever the server's default: one who waited for a row's lock must then see what its holder did.
        engine = create_engine(parsed, pool_pre_ping=True, isolation_level="READ COMMITTED")
    else:
        if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
            raise InvalidInput("store_url", url, "a file: the supervisor is another process and must see the jobs")
        _make_private_file(Path(parsed.database))
        engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
    try:
        with engine.execution_options(writes=True).begin() as connection:
            _bring_schema_up(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def for_reading(engine: Engine) -> Engine:
    """`engine`, for transactions that read alone: each of their queries sees the store as it was at the first one.

    SQLite's do so anyway. PostgreSQL's would otherwise see a job that waits in one query, and in the next that it was
    claimed meanwhile.
    """
    return engine if engine.dialect.name == "sqlite" else engine.execution_options(isolation_level="REPEATABLE READ")


def _make_private_file(path: Path) -> None:
    """Make an empty WAL database that only this user can read; SQLite gives its -wal and -shm files the same mode.

    Never by opening `path`: closing a file drops all locks that this process holds on it, those of its SQLite
    connections too (sqlite.org/howtocorrupt.html, 2.2). The next process to leave would then take itself for the last
    one, delete the -wal file, and leave those connections writing where nobody reads.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    # In WAL mode from the first moment it is seen: of two processes that both change the mode of a new file, SQLite
    # refuses one at once ("database is locked"), whatever the busy timeout.
    with closing(sqlite3.connect(name)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    with suppress(FileExistsError):  # made by another process meanwhile
        os.link(name, path)
    os.unlink(name)


def _on_sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # sqlite3's own BEGIN comes too late, see _on_sqlite_begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # With WAL, a power cut may lose the last transactions but never the file; a job that a client was told about
    # must stay, hence FULL.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _bring_schema_up(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # Two servers that start at once would both find no table and both make it.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_SCHEMA_LOCK})
    if not inspect(connection).has_table(schema_table.name):
        METADATA.create_all(connection)
        connection.execute(insert(schema_table).values(version=SCHEMA_VERSION))
        connection.execute(insert(supervisor_table).values(id=1))
        return
    version = connection.execute(select(schema_table.c.version)).scalar_one()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise InvalidInput(
            "store_url",
            connection.engine.url.render_as_string(hide_password=True),
            f"a store of schema version {SCHEMA_VERSION}; this one has version {version}, so another version of "
            "llama-stack-provider-moe made it: run that one, or name another store",
        )
    # Here, and not above: hardly any start needs alembic, and every start would pay for its import.
    from llama_stack_provider_moe.jobs.migrations import migrate

    migrate(connection, version)
    connection.execute(update(schema_table).values(version=SCHEMA_VERSION))
