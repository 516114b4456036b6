"""`DatasetTable`: the versions of the data sets that owners uploaded. Their rows are files (`dataset_files`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, delete, func, insert, select, update

from llama_stack_provider_moe.control.store.schema import TableRow, datasets_table
from llama_stack_provider_moe.errors import InvalidInput, NotFound, TooLarge
from llama_stack_provider_moe.ground.clock import now

_T = datasets_table.c
VERSION_EXPECTED = "6 to 64 hexadecimal digits, the beginning of a version's SHA-256"


@dataclass(frozen=True)
class DatasetVersion:
    """One version of an owner's data set."""

    id: str  # of its folder in `datasets_dir`
    owner: str
    name: str
    sha256: str  # of the stored file; it names the version
    rows: int
    bytes: int
    columns: dict[str, int]  # name -> number of rows with a value in that column
    created_at: datetime


class Overview(NamedTuple):
    """A data set in a list: its current version, and the size of all its versions."""

    current: DatasetVersion
    versions: int
    total_bytes: int


class DatasetTable:
    """Data sets in the store. Each method is one transaction; each takes the owner, who sees only their own.

    Args:
        reading: Engine for transactions that only read.
        writing: Engine for transactions that write.
    """

    def __init__(self, reading: Engine, writing: Engine) -> None:
        self._reading = reading
        self._writing = writing

    @property
    def is_embedded(self) -> bool:
        """Whether the database is a local file. Then a failed transaction has certainly not happened."""
        return self._reading.dialect.name == "sqlite"

    def add(
        self, new: DatasetVersion, quota_bytes: int, setting: str = "dataset_quota_bytes"
    ) -> tuple[DatasetVersion, bool]:
        """Insert a version, or find the stored one with the same content; it becomes the current version.

        Only one process may call it at a time (`dataset_files.locked`).

        Args:
            new: The version.
            quota_bytes: The largest size of everything that its owner has stored.
            setting: The setting that limits it, for the error text.

        Returns:
            The stored version, and whether it is new.

        Raises:
            TooLarge: It would exceed the quota.
        """
        with self._writing.begin() as connection:
            turn = 1 + (connection.execute(_of(new.owner, new.name, func.max(_T.turn))).scalar_one() or 0)
            same = and_(_T.owner == new.owner, _T.name == new.name, _T.sha256 == new.sha256)
            found = connection.execute(select(datasets_table).where(same)).one_or_none()
            if found is not None:
                connection.execute(update(datasets_table).where(_T.id == found.id).values(turn=turn))
                return _version(found), False
            used_bytes = _used_bytes(connection, new.owner)
            if used_bytes + new.bytes > quota_bytes:
                raise TooLarge(quota_text(new.name, new.bytes, used_bytes, quota_bytes, setting))
            values = {**vars(new), "columns": json.dumps(new.columns, ensure_ascii=True), "turn": turn}
            connection.execute(insert(datasets_table).values(values))
            return new, True

    def used_bytes(self, owner: str) -> int:
        """Return the size of everything that an owner has stored."""
        with self._reading.begin() as connection:
            return _used_bytes(connection, owner)

    def largest_bytes(self, owner: str, name: str) -> int:
        """Return the size of the largest version of a data set; 0 if there is none."""
        with self._reading.begin() as connection:
            return connection.execute(_of(owner, name, func.max(_T.bytes))).scalar_one() or 0

    def has(self, owner: str, name: str) -> bool:
        """Return whether the owner has a data set of that name."""
        with self._reading.begin() as connection:
            return connection.execute(_of(owner, name, _T.id).limit(1)).first() is not None

    def get(self, owner: str, name: str, version: str | None = None) -> DatasetVersion:
        """Return a version of a data set.

        Args:
            owner: Its owner.
            name: Its name.
            version: The beginning of the version's SHA-256; None for the current version.

        Raises:
            NotFound: The owner has no such data set or version.
            InvalidInput: `version` fits several versions, or no SHA-256.
        """
        with self._reading.begin() as connection:
            return _version(_find(connection, owner, name, version))

    def overviews(self, owner: str, limit: int, after: str | None) -> list[Overview]:
        """Return a page of an owner's data sets, by name.

        Args:
            owner: Their owner.
            limit: The largest number of data sets.
            after: The last name of the previous page.
        """
        sums = select(
            _T.name, func.max(_T.turn).label("turn"), func.count().label("versions"), func.sum(_T.bytes).label("total")
        ).where(_T.owner == owner)
        if after is not None:
            sums = sums.where(_T.name > after)
        page = sums.group_by(_T.name).order_by(_T.name).limit(limit).subquery()
        joined = and_(_T.owner == owner, _T.name == page.c.name, _T.turn == page.c.turn)
        query = (
            select(datasets_table, page.c.versions, page.c.total)
            .join_from(page, datasets_table, joined)
            .order_by(page.c.name)
        )
        with self._reading.begin() as connection:
            return [Overview(_version(row), row.versions, int(row.total)) for row in connection.execute(query)]

    def versions(self, owner: str, name: str, limit: int) -> list[DatasetVersion]:
        """Return the newest versions of a data set, the current one first.

        Raises:
            NotFound: The owner has no such data set.
        """
        with self._reading.begin() as connection:
            query = _of(owner, name, *datasets_table.c).order_by(_T.turn.desc()).limit(limit)
            found = [_version(row) for row in connection.execute(query)]
        if not found:
            raise _missing(name)
        return found

    def delete(self, owner: str, name: str, version: str | None = None) -> list[DatasetVersion]:
        """Delete one version of a data set, or all with None; return what was deleted.

        Raises:
            NotFound: The owner has no such data set or version.
            InvalidInput: `version` fits several versions, or no SHA-256.
        """
        with self._writing.begin() as connection:
            if version is None:
                rows: Sequence[TableRow] = connection.execute(_of(owner, name, *datasets_table.c)).all()
                if not rows:
                    raise _missing(name)
            else:
                rows = [_find(connection, owner, name, version)]
            for row in rows:
                connection.execute(delete(datasets_table).where(_T.id == row.id))
            return [_version(row) for row in rows]

    def owners(self, connection: Connection) -> set[str]:
        """Return the owners of all data sets, inside a transaction."""
        return set(connection.execute(select(_T.owner).distinct()).scalars())

    def ids(self) -> set[str]:
        """Return the ids of all versions of all owners."""
        with self._reading.begin() as connection:
            return set(connection.execute(select(_T.id)).scalars())

    def is_there(self, dataset_id: str) -> bool:
        """Return whether a version has this id."""
        with self._reading.begin() as connection:
            return connection.execute(select(_T.id).where(_T.id == dataset_id)).first() is not None


def quota_text(name: str, size_bytes: int, used_bytes: int, quota_bytes: int, setting: str) -> str:
    """Return why a data set does not fit, and what to do.

    Args:
        name: Its name.
        size_bytes: Its size, or the part that has arrived.
        used_bytes: Size of its owner's data sets.
        quota_bytes: The most that they may be.
        setting: The setting of the server that says so.
    """
    return (
        f"{name}: at least {size_bytes:,} bytes, but of your {quota_bytes:,} bytes on this server "
        f"(`{setting}`) {used_bytes:,} are used; delete data sets or versions (moe-train data rm NAME)"
    )


def new_version(
    dataset_id: str, owner: str, name: str, sha256: str, rows: int, size_bytes: int, columns: dict[str, int]
) -> DatasetVersion:
    """Return a version that is created now."""
    return DatasetVersion(dataset_id, owner, name, sha256, rows, size_bytes, columns, now())


def _used_bytes(connection: Connection, owner: str) -> int:
    query = select(func.coalesce(func.sum(_T.bytes), 0)).where(_T.owner == owner)
    return int(connection.execute(query).scalar_one())


def _find(connection: Connection, owner: str, name: str, version: str | None) -> TableRow:
    query = _of(owner, name, *datasets_table.c).order_by(_T.turn.desc()).limit(2)
    if version is None:
        row = connection.execute(query).first()
        if row is None:
            raise _missing(name)
        return row
    if not 6 <= len(version) <= 64 or not set(version) <= set("0123456789abcdef"):
        raise InvalidInput("version", version, VERSION_EXPECTED)
    found = connection.execute(query.where(_T.sha256.startswith(version, autoescape=True))).all()
    if len(found) > 1:
        raise InvalidInput("version", version, f"more digits: several versions of data set {name!r} begin so")
    if not found:
        raise NotFound(f"you have no version {version!r} of a data set {name!r} on this server")
    return found[0]


def _of(owner: str, name: str, *columns: ColumnElement[Any]) -> Select[Any]:
    return select(*columns).where(_T.owner == owner, _T.name == name)


def _missing(name: str) -> NotFound:
    return NotFound(f"you have no data set {name!r} on this server")


def _version(row: TableRow) -> DatasetVersion:
    return DatasetVersion(
        id=row.id, owner=row.owner, name=row.name, sha256=row.sha256, rows=row.rows, bytes=row.bytes,
        columns=json.loads(row.columns), created_at=row.created_at,
    )  # fmt: skip
