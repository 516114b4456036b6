"""Classify errors of the store and of files: a full disk, a lost database, or something else."""

import errno
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_POSTGRES_NO_ROOM = "53100"  # disk_full
# PostgreSQL's error classes about the server instead of the statement: connection, resources, operator.
_POSTGRES_LOST = ("08", "53", "57", "58")
_SQLITE_NO_ROOM = "database or disk is full"
# SQLite's `DatabaseError`s for which sqlite3 has no separate class.
_SQLITE_LOST = ("file is not a database", "database disk image is malformed")


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or one of its causes reports a full disk or an exhausted quota."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _NO_ROOM:
            return True
        if _SQLITE_NO_ROOM in str(each) or getattr(each, "sqlstate", None) == _POSTGRES_NO_ROOM:
            return True
    return False


def is_store_lost(error: BaseException) -> bool:
    """Whether `error` or one of its causes reports that the database can't be reached or used at all.

    A full disk does not count: existing data can still be read.
    """
    if is_disk_full(error):
        return False
    for each in _chain(error):
        if isinstance(each, PoolTimeout | DisconnectionError | InterfaceError):
            return True
        if isinstance(each, DBAPIError):
            state = getattr(each.orig, "sqlstate", None)
            if state is not None:
                return str(state).startswith(_POSTGRES_LOST)
            text = str(each.orig)
            if isinstance(each, OperationalError):  # "no such column" and "syntax error" are our own mistakes
                return "no such column" not in text and "syntax error" not in text
            if any(words in text for words in _SQLITE_LOST):
                return True
    return False


def brief(error: BaseException) -> str:
    """One line of an error of the store, without SQL statements and addresses."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    line = str(cause).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {line[:200]}" if isinstance(error, SQLAlchemyError) else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
