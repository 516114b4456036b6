"""Open a store: connections, and the schema that is created, migrated or checked.

All code that depends on the kind of database is here. `schema` has the tables.
"""

import os
import sqlite3
import tempfile
import uuid
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, select, text, update
from sqlalchemy.pool import NullPool

from llama_stack_provider_moe.control.store import store_url
from llama_stack_provider_moe.control.store.database_file import DatabaseFile, damage_reported, damaged
from llama_stack_provider_moe.control.store.reserve import Reserve
from llama_stack_provider_moe.control.store.schema import (
    METADATA,
    SCHEMA_VERSION,
    identity_table,
    schema_table,
    supervisor_table,
)
from llama_stack_provider_moe.errors import InvalidInput

BUSY_TIMEOUT_S = 15
# After this many pages, SQLite moves its write-ahead log into the database, so the log stays smaller than the reserve.
CHECKPOINT_PAGES = 100
# In addition to the 5 that SQLAlchemy keeps open. Each server thread that uses the store needs one
# (`control.server.store_watch`); a thread that waited for one in vain would report the store as lost.
MORE_CONNECTIONS = 20
# An arbitrary number; every process that opens the store must use the same one.
_POSTGRES_SCHEMA_LOCK = 0x6D6F65


def open_engine(url: str) -> Engine:
    """Open an engine for `url`, and create, migrate or check its schema.

    SQLite gets a folder (0700) and a file (0600), WAL, foreign keys and a busy timeout. Transactions of an engine
    from `engine.execution_options(writes=True)` take SQLite's write lock when they begin. A transaction that reads
    first and asks for the lock later is refused at once if another one wrote in between, whatever the busy timeout.

    Tables of an older version are migrated in the transaction that finds them.

    Raises:
        InvalidInput: `url` is not an SQLAlchemy URL, names a database in the memory of one process, or names a
            database that is damaged or has the schema of a newer version of this package.
    """
    parsed = store_url.parsed(url)
    if parsed.get_backend_name() != "sqlite":
        # Set explicitly: a transaction that waited for a row's lock must see what the lock's holder did.
        engine = store_url.engine(
            parsed, pool_pre_ping=True, isolation_level="READ COMMITTED", max_overflow=MORE_CONNECTIONS,
            connect_args=store_url.time_limit(parsed),
        )  # fmt: skip
    else:
        _make_private_file(_file_of(parsed))
        reserve = Reserve(_file_of(parsed))
        reserve.maintain()  # the first connection may create files
        engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=MORE_CONNECTIONS)
        event.listen(engine, "connect", _on_sqlite_connect)

        def begin(connection: Connection) -> None:
            writes = connection.get_execution_options().get("writes", False)
            if writes:
                reserve.maintain()
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        event.listen(engine, "begin", begin)
    try:
        with damage_reported(parsed), engine.execution_options(writes=True).begin() as connection:
            _bring_schema_up(connection)
        if parsed.get_backend_name() == "sqlite":
            file = DatabaseFile(_file_of(parsed))
            event.listen(engine, "begin", file.check)
            # A new connection to a deleted file would create an empty one in its place.
            event.listen(engine, "do_connect", lambda *_: file.check())
    except BaseException:
        engine.dispose()
        raise
    return engine


def identity_of(url: str) -> str | None:
    """Return the id of the store at `url`; None if there is no store yet, or it is older than ids. Creates nothing.

    Raises:
        InvalidInput: See `open_engine`.
        SQLAlchemyError: The database does not answer.
    """
    parsed = store_url.parsed(url)
    if parsed.get_backend_name() == "sqlite":
        if not _file_of(parsed).exists():
            return None
        Reserve(_file_of(parsed)).release_if_needed()  # SQLite creates files even to read
        # With `mode=rw`, SQLite does not create the file again if it is deleted meanwhile.
        path = f"file:{quote(str(_file_of(parsed).absolute()))}"
        looking = create_engine(
            parsed.set(database=path).update_query_dict({"mode": "rw", "uri": "true"}), poolclass=NullPool,
            connect_args={"timeout": BUSY_TIMEOUT_S},
        )  # fmt: skip
    else:
        limit = store_url.time_limit(parsed)
        looking = store_url.engine(parsed, poolclass=NullPool, connect_args=limit)
    with damage_reported(parsed), looking.connect() as connection:
        version = _version(connection, parsed)
        if version is None or (version < SCHEMA_VERSION and not inspect(connection).has_table(identity_table.name)):
            return None
        return str(connection.execute(select(identity_table.c.id)).scalar_one())


def for_reading(engine: Engine) -> Engine:
    """Return `engine` for read-only transactions: each query sees the store as it was at the transaction's first query.

    SQLite does so anyway. With PostgreSQL's default, one query could see a job that waits and the next one see that
    it was claimed meanwhile.
    """
    return engine if engine.dialect.name == "sqlite" else engine.execution_options(isolation_level="REPEATABLE READ")


def _file_of(url: URL) -> Path:
    """Return the file of a SQLite store."""
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise InvalidInput("store_url", str(url), "a file, because the supervisor is another process and reads it")
    return Path(url.database)


def _make_private_file(path: Path) -> None:
    """Create an empty WAL database that only this user can read. SQLite gives its -wal and -shm files the same mode.

    This must not open `path`: closing a file drops all locks that this process holds on it, including those of its
    SQLite connections (sqlite.org/howtocorrupt.html, 2.2). The next process to close the database would believe that it
    is the last one and delete the -wal file, while those connections still write to it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    # The file appears in WAL mode. If two processes change the mode of a new file, SQLite refuses one at once
    # ("database is locked"), whatever the busy timeout.
    with closing(sqlite3.connect(name)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    with suppress(FileExistsError):  # another process created it meanwhile
        os.link(name, path)
    os.unlink(name)


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # sqlite3's own BEGIN comes too late, see `open_engine`
    connection.text_factory = _text  # otherwise one text that is not UTF-8 makes the whole query fail
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # With WAL and NORMAL, a power cut may lose the last transactions, but never the file. FULL keeps those too: a
    # job that was confirmed to a client must not disappear.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    cursor.close()


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _bring_schema_up(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # Otherwise two servers that start at once would both find no table and both create it.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_SCHEMA_LOCK})
    version = _version(connection, connection.engine.url)
    if version is None:
        METADATA.create_all(connection)
        connection.execute(insert(schema_table).values(version=SCHEMA_VERSION))
        connection.execute(insert(supervisor_table).values(id=1))
        connection.execute(insert(identity_table).values(id=str(uuid.uuid4())))
        return
    if version == SCHEMA_VERSION:
        if connection.execute(select(supervisor_table.c.id)).first() is None:  # there must always be a row to lock
            connection.execute(insert(supervisor_table).values(id=1))
        return
    # Imported here because hardly any start needs alembic, and every start would pay for the import.
    from llama_stack_provider_moe.control.store.migrations import migrate

    migrate(connection, version)
    connection.execute(update(schema_table).values(version=SCHEMA_VERSION))


def _version(connection: Connection, url: URL) -> int | None:
    """Return the schema's version, at most `SCHEMA_VERSION`; None for a database without our tables.

    Raises:
        InvalidInput: The schema is newer, or tables are damaged or missing; the text names `url`.
    """
    if not inspect(connection).has_table(schema_table.name):
        return None
    versions = connection.execute(select(schema_table.c.version)).scalars().all()
    if len(versions) != 1 or not isinstance(versions[0], int) or versions[0] < 1:
        found = ", ".join(repr(each) for each in versions) or "none"
        raise damaged(url, f"its table {schema_table.name} should hold one version and holds {found}")
    version = versions[0]
    if version == SCHEMA_VERSION:
        missing = [table.name for table in METADATA.sorted_tables if not inspect(connection).has_table(table.name)]
        if missing:
            raise damaged(url, f"it has no table {', '.join(missing)}")
    if version > SCHEMA_VERSION:
        raise InvalidInput(
            "store_url",
            url.render_as_string(hide_password=True),
            f"a store of schema version {SCHEMA_VERSION}; this one has version {version}, so another version of "
            "llama-stack-provider-moe created it: run that version, or use another store",
        )
    return version
