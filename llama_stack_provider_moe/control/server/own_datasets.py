"""Data sets that owners upload: their routes' answers, and their rows for jobs.

A job's `dataset_id` is one of

    NAME             the caller's data set of that name, or else the host's
    NAME@3fa8c1      the version of the caller's data set whose SHA-256 begins so
    data:NAME        the caller's, never the host's
    host:ID          the host's, never the caller's
    feedback:all     the caller's flagged conversations (`flagged`); feedback:answered: those that end with an answer
"""

import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.flagged import PREFIX, Flagged, FlaggedRows
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.quotas import Quotas
from llama_stack_provider_moe.control.server.uploads import Form, Uploads
from llama_stack_provider_moe.control.server.wire_datasets import (
    Dataset,
    DatasetLine,
    DatasetRows,
    DatasetVersionInfo,
    DeletedDataset,
    ErasedFeedback,
    FeedbackBody,
    ListDatasetsResponse,
    PushedDataset,
)
from llama_stack_provider_moe.control.store import dataset_files
from llama_stack_provider_moe.control.store.audit import Audit
from llama_stack_provider_moe.control.store.dataset_rows import DatasetTable, DatasetVersion, Overview
from llama_stack_provider_moe.control.store.image_folder import beside
from llama_stack_provider_moe.errors import InvalidInput, NotFound
from llama_stack_provider_moe.jobdir.row_sources import DataSource, SourceKind
from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN
from llama_stack_provider_moe.spec.row_files import loaded_row
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.server_config import ProviderConfig

OWN, HOSTS = "data:", "host:"
PAGE_BYTES = 8 << 20
_NAME = re.compile(JOB_ID_PATTERN)
_reading = Pool("moe-own-data", 2, 256, "uploaded data sets")


class Found(NamedTuple):
    """The data set that a `dataset_id` means.

    Attributes:
        host_id: its id on the host; None for the caller's own.
        host_kind: what the host has under that id.
        version: the version of the caller's own.
        path: the file with the version's rows.
        flagged: the caller's flagged conversations.
        images: takes the images of the rows of a file on the host.
    """

    host_id: str | None
    host_kind: SourceKind = "host data set"
    version: DatasetVersion | None = None
    path: Path | None = None
    flagged: FlaggedRows | None = None
    images: ImageDoor | None = None

    def pages(
        self, deps: compat.Deps, dataset_id: str, rows_per_page: int, field: str, admit: Callable[[str], None]
    ) -> AsyncIterator[list[object]]:
        """Yield the rows in pages; arguments and errors are those of `compat.dataset_pages`."""
        if self.flagged is not None:
            return self.flagged.pages(rows_per_page)
        if self.path is not None:
            return _pages(self.path, dataset_id, rows_per_page)
        return compat.dataset_pages(deps, self.host_id or dataset_id, rows_per_page, field, admit, self.images)

    def notes(self, field: str) -> list[str]:
        """Return which version of an uploaded data set the job reads, in a sentence for the caller.

        Args:
            field: the caller's name for the field.
        """
        if self.flagged is not None:
            return [f"{field}: your flagged conversations as they are now, version {self.flagged.sha256[:12]}"]
        if self.version is None:
            return []
        found = self.version
        return [f"{field}: your data set {found.name!r}, version {found.sha256[:12]} with {found.rows:,} rows"]

    def source(self, rows: int) -> DataSource:
        """Return what the job's folder says about it.

        Args:
            rows: number of rows that were copied.
        """
        if self.flagged is not None:
            return DataSource(kind=self.host_kind, id=str(self.host_id), version=self.flagged.sha256, rows=rows)
        if self.version is not None:
            return DataSource(kind="data", id=self.version.name, version=self.version.sha256, rows=rows)
        return DataSource(kind=self.host_kind, id=str(self.host_id), version=None, rows=rows)


class OwnDatasets:
    """The uploaded data sets of one service.

    Args:
        config: the server's configuration.
        guard: the service's threads.
        table: returns the store's data sets, once the store is open.
        quotas: the limits of owners.
        audit: writes down uploads and deletions.
        deps: the host's APIs.

    Attributes:
        flagged: conversations that shields flagged.
    """

    def __init__(
        self,
        config: ProviderConfig,
        guard: Guard,
        table: Callable[[], DatasetTable],
        quotas: Quotas,
        audit: Audit,
        deps: compat.Deps,
    ) -> None:
        self._config = config
        self._guard = guard
        self._table = table
        self._quotas = quotas
        self._audit = audit
        self._uploads = Uploads(config, guard, quotas.left_for_datasets, deps)
        self.flagged = Flagged(config.feedback)

    async def put(
        self, owner: str, name: str, form: Form, body: AsyncIterator[bytes], sha256: str | None
    ) -> PushedDataset:
        """Store a body as a version of a data set; see `Uploads.receive`."""
        await self._guard.run(self._quotas.must_have_bytes, owner)
        stored = await self._uploads.receive(self._table(), owner, checked_name(name), form, body, sha256)
        self._audit.note(
            owner, "upload dataset", dataset=name, version=stored.sha256, rows=stored.rows, bytes=stored.bytes
        )
        return stored

    async def put_flagged(self, owner: str, whose: str | None, asked: FeedbackBody) -> PushedDataset:
        """Store flagged conversations as a version of a data set; the same ones again are the same version.

        Args:
            owner: the caller.
            whose: the owner whose jobs the caller may read; None for every owner's.
            asked: which, and the name of the data set.
        """
        body = await self.flagged.body(owner, whose, asked)
        return await self.put(owner, asked.name, Form("jsonl", False), body, None)

    async def erase_flagged(self, owner: str) -> ErasedFeedback:
        """Delete what is kept of an owner's flagged conversations."""
        gone = await self.flagged.erase(owner)
        self._audit.note(owner, "erase feedback", bytes=gone.bytes)
        return gone

    async def list(self, owner: str, limit: int, after: str | None) -> ListDatasetsResponse:
        """Return a page of an owner's data sets, by name; `after` is the last name of the previous page."""
        found, used_bytes = await self._guard.run(
            lambda: (self._table().overviews(owner, limit + 1, after), self._table().used_bytes(owner))
        )
        return ListDatasetsResponse(
            data=[_line(each) for each in found[:limit]], has_more=len(found) > limit, used_bytes=used_bytes,
            quota_bytes=self._config.dataset_quota_bytes,
        )  # fmt: skip

    async def get(self, owner: str, name: str, limit: int) -> Dataset:
        """Return a data set and its newest versions."""
        found = await self._guard.run(self._table().versions, owner, checked_name(name), limit + 1)
        return Dataset(name=name, versions=[_info(each) for each in found[:limit]], has_more=len(found) > limit)

    async def version(self, owner: str, name: str, version: str | None) -> DatasetVersion:
        """Return a version of a data set; None stands for the current one."""
        return await self._guard.run(self._table().get, owner, checked_name(name), version)

    async def rows(self, owner: str, name: str, version: str | None, cursor: int, limit: int) -> DatasetRows:
        """Return rows of a version from byte `cursor` on.

        Raises:
            InvalidInput: no row begins at that byte.
            NotFound: no such data set or version.
        """
        found = await self.version(owner, name, version)
        path = dataset_files.rows_of(self._config, found.id)
        rows, end, size_bytes = await _reading.run(_rows_at, path, name, cursor, limit)
        return DatasetRows(name=name, sha256=found.sha256, rows=rows, cursor=end, has_more=end < size_bytes)

    async def delete(self, owner: str, name: str, version: str | None) -> DeletedDataset:
        """Delete a data set, or one version of it. Jobs have copies of their rows."""
        gone = await self._guard.run(
            dataset_files.remove, self._config, self._table(), owner, checked_name(name), version
        )
        self._audit.note(owner, "delete dataset", dataset=name, versions=" ".join(each.sha256 for each in gone))
        return DeletedDataset(
            name=name, versions=[each.sha256 for each in gone], bytes=sum(each.bytes for each in gone)
        )

    async def find(self, deps: compat.Deps, owner: str, dataset_id: str, field: str) -> Found:
        """Return what a job's `dataset_id` means.

        Args:
            deps: the host's APIs.
            owner: the caller.
            dataset_id: as the caller wrote it.
            field: the caller's name for the field, for error texts.

        Raises:
            NotFound: the caller has no such data set or version. Whether the host has one shows when it is read.
            InvalidInput: the name fits a data set of the caller's and one of the host's, or several versions.
        """
        if dataset_id.startswith(PREFIX):
            rows = self.flagged.rows(owner, dataset_id, field)
            return Found(dataset_id, "flagged conversations", flagged=rows)
        if dataset_id.startswith(HOSTS):
            host_id = dataset_id.removeprefix(HOSTS)
            return Found(host_id, compat.rows_kind(deps, host_id))
        name, at, version = dataset_id.removeprefix(OWN).partition("@")
        if dataset_id.startswith(OWN):
            return await self._own(owner, name, version if at else None)
        if not _NAME.fullmatch(name) or not await self._guard.run(self._table().has, owner, name):
            return Found(dataset_id, compat.rows_kind(deps, dataset_id))
        if await compat.has_dataset(deps, dataset_id):
            kind = compat.rows_kind(deps, dataset_id)
            raise InvalidInput(field, dataset_id, f"{OWN}{dataset_id} for the data set that you uploaded, or "
                               f"{HOSTS}{dataset_id} for the {kind}: both have this name")  # fmt: skip
        return await self._own(owner, name, version if at else None)

    async def row_count(self, owner: str, dataset_id: str) -> int | None:
        """Return the number of rows of what a job's `dataset_id` means; None if it is not the caller's own data set."""
        found = await self._version(owner, dataset_id)
        return None if found is None else found.rows

    async def has_images(self, owner: str, dataset_id: str) -> bool | None:
        """Return whether rows of what a job's `dataset_id` means have images; None if it is not the caller's own."""
        found = await self._version(owner, dataset_id)
        if found is None:
            return None
        return await self._guard.in_state_dir(beside(dataset_files.rows_of(self._config, found.id)).is_dir)

    async def _version(self, owner: str, dataset_id: str) -> DatasetVersion | None:
        name, at, version = dataset_id.removeprefix(OWN).partition("@")
        if dataset_id.startswith(HOSTS) or not _NAME.fullmatch(name):
            return None
        try:
            return await self._guard.run(self._table().get, owner, name, version if at else None)
        except (NotFound, InvalidInput):  # it may be the host's
            return None

    async def _own(self, owner: str, name: str, version: str | None) -> Found:
        found = await self._guard.run(self._table().get, owner, name, version)
        return Found(None, version=found, path=dataset_files.rows_of(self._config, found.id))


def checked_name(name: str) -> str:
    """Return a data set's name, unchanged.

    Raises:
        InvalidInput: it is not a name; a name is also never a path.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput("name", name, "1 to 128 letters, digits, dots, dashes and underscores, the first one a "
                           "letter or digit")  # fmt: skip
    return name


async def _pages(path: Path, dataset_id: str, rows_per_page: int) -> AsyncIterator[list[object]]:
    try:
        file = await _reading.run(path.open, "rb")
    except FileNotFoundError:
        raise NotFound(f"data set {dataset_id!r} was deleted just now") from None
    try:
        while page := await _reading.run(_page, file, rows_per_page):
            yield page
    finally:
        file.close()  # of a file that was read, which does not block


def _rows_at(path: Path, name: str, cursor: int, limit: int) -> tuple[list[object], int, int]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"data set {name!r} was deleted just now") from None
    with file:
        if cursor:
            file.seek(cursor - 1)
            if file.read(1) != b"\n":
                raise InvalidInput("cursor", cursor, "0, or `cursor` of the previous page")
        return _page(file, limit), file.tell(), os.fstat(file.fileno()).st_size


def _page(file: BinaryIO, rows: int) -> list[object]:
    found: list[object] = []
    size = 0
    while len(found) < rows and size < PAGE_BYTES and (line := file.readline()):
        found.append(loaded_row(line))
        size += len(line)
    return found


def _info(version: DatasetVersion) -> DatasetVersionInfo:
    return DatasetVersionInfo(
        sha256=version.sha256, rows=version.rows, bytes=version.bytes, columns=version.columns,
        created_at=version.created_at,
    )  # fmt: skip


def _line(found: Overview) -> DatasetLine:
    return DatasetLine(
        name=found.current.name, sha256=found.current.sha256, rows=found.current.rows, bytes=found.current.bytes,
        created_at=found.current.created_at, versions=found.versions, total_bytes=found.total_bytes,
    )  # fmt: skip
