"""The SQLite file of a store: detect damage, and detect that the open file was deleted or replaced.

A process can keep writing to a file that somebody deleted or replaced by a backup. Those writes are lost when the last
connection closes. So each transaction first checks that the path still leads to the open file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection
from sqlalchemy.exc import DatabaseError

from llama_stack_provider_moe.errors import InvalidInput, StoreReplaced

# sqlite.org/rescode.html: the file is not a database, or its structure is broken.
_DAMAGE = ("SQLITE_NOTADB", "SQLITE_CORRUPT")


class DatabaseFile:
    """The file that was at `path` when this object was created.

    Args:
        path: Path of a SQLite database that is open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = _identity(path)

    def check(self, _: Connection | None = None) -> None:
        """Check that the path still leads to the same file. A listener for SQLAlchemy's `begin` event.

        Raises:
            StoreReplaced: The file was deleted or replaced.
        """
        now = _identity(self._path)
        if now != self._opened:
            happened = "was deleted" if now is None else "was replaced by another file"
            raise StoreReplaced(
                f"the job store {self._path} {happened} while this process had it open; this process no longer writes "
                "to the old file: put the right file in its place, without the -wal and -shm files of the old one, and "
                "restart the server (a supervisor ends by itself)"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def damaged(url: URL, what: str) -> InvalidInput:
    """Build the one-line error for a store that can't be used; it says what to do."""
    return InvalidInput(
        "store_url",
        url.render_as_string(hide_password=True),
        f"a readable job store ({what}): put a backup in its place, or move it away to start with an empty "
        "one; the jobs' folders stay as they are",
    )


@contextmanager
def damage_reported(url: URL) -> Iterator[None]:
    """Turn SQLite's errors about a damaged file into `damaged`."""
    try:
        yield
    except DatabaseError as error:
        if getattr(error.orig, "sqlite_errorname", "").startswith(_DAMAGE):
            raise damaged(url, str(error.orig)) from None
        raise
