"""Receives a data set: the body of a request -> a checked file of rows -> a version in the store.

Rows are checked as they arrive. Memory holds a piece of the body, one row and one image. Parsing and writing run in
threads, and only there; a client that sends faster waits.
"""

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from llama_stack_provider_moe.control.server import compat, image_doors
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.wire_datasets import PushedDataset
from llama_stack_provider_moe.control.store.dataset_files import Arriving, Room
from llama_stack_provider_moe.control.store.dataset_rows import DatasetTable, DatasetVersion, quota_text
from llama_stack_provider_moe.errors import InvalidInput, Unavailable
from llama_stack_provider_moe.spec.row_files import FileFormat, FileRow, RowFile
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.server_config import ProviderConfig

NOT_STORED = "the data set was not stored"
STOPPING = "the server is shutting down; send the data set again"
MAX_UPLOADS = 32  # at a time in this process
MAX_OF_OWNER = 16  # at a time of one owner, so that nobody takes them all
SILENCE_S = 120.0  # without a byte, after which an upload is refused
LOOK_S = 0.5
PIECE_BYTES = 256 << 10
LOOK_BYTES = 8 << 20  # after so many bytes, look whether the disk is full
JSONL_TYPES = (
    "", "application/jsonl", "application/x-jsonl", "application/jsonlines", "application/x-ndjson",
    "application/ndjson", "application/octet-stream", "text/plain",
)  # fmt: skip
GZIP_TYPES = ("application/gzip", "application/x-gzip")
CSV_TYPES = ("text/csv", "application/csv")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_uploading = Pool("moe-upload", 2, 256, "uploads of data sets")


class Form(NamedTuple):
    """What a request's headers say about its body; `gzipped` None: look at the first bytes."""

    file_format: FileFormat
    gzipped: bool | None


def form_of(content_type: str | None, content_encoding: str | None) -> Form:
    """Return the form of a body.

    Raises:
        InvalidInput: the server can't read bodies of that form.
    """
    encoding = (content_encoding or "identity").strip().lower()
    if encoding not in ("gzip", "x-gzip", "identity"):
        raise InvalidInput("Content-Encoding", content_encoding, "gzip, or none")
    gzipped = True if encoding != "identity" else None
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type in CSV_TYPES:
        return Form("csv", gzipped)
    if media_type in JSONL_TYPES:
        return Form("jsonl", gzipped)
    if media_type in GZIP_TYPES:
        return Form("jsonl", True)
    raise InvalidInput("Content-Type", content_type, "application/jsonl, application/x-ndjson or text/csv, each also "
                       "gzipped, or application/gzip for gzipped JSON Lines")  # fmt: skip


class Uploads:
    """The uploads that this process receives.

    Args:
        config: the server's configuration.
        guard: runs what needs the store.
        left_for_datasets: how many bytes an owner's data sets may take beside their jobs; None: no such limit.
        deps: the host's APIs, for images among its files.
    """

    def __init__(
        self,
        config: ProviderConfig,
        guard: Guard,
        left_for_datasets: Callable[[str], int | None],
        deps: compat.Deps,
    ) -> None:
        self._config = config
        self._guard = guard
        self._deps = deps
        self._left_for_datasets = left_for_datasets
        self._running: Counter[str] = Counter()  # uploads by owner

    async def receive(
        self,
        table: DatasetTable,
        owner: str,
        name: str,
        form: Form,
        body: AsyncIterator[bytes],
        sha256: str | None = None,
    ) -> PushedDataset:
        """Store the rows of a body as a version of a data set, or nothing at all.

        Args:
            table: the store's data sets.
            owner: owner of the data set.
            name: its name.
            form: form of the body.
            body: the body, in pieces.
            sha256: checksum that the body must have; None: any.

        Raises:
            InvalidRows: rows are not valid.
            InvalidInput: the body can't be read, or has another checksum.
            TooLarge: it exceeds a limit of the server, or the owner's quota.
            NoRoom: the server's disk is full.
            Unavailable: too many uploads at a time.
        """
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise InvalidInput("sha256", sha256, "64 hexadecimal digits, the SHA-256 of the body")
        with self._one_more(owner):
            await self._guard.must_have_room(NOT_STORED)
            room = await self._guard.run(self._room, table, owner, name)
            most_bytes, most_rows = self._config.max_dataset_bytes, self._config.max_rows
            arriving = await _uploading.run(Arriving, self._config, room)
            door = ImageDoor(
                self._config.images, arriving.images.keep, fetch=image_doors.files_of_host(self._config, self._deps)
            )
            file = RowFile(name, form.file_format, form.gzipped, most_bytes, most_rows, door)
            try:
                digest, received = hashlib.sha256(), 0
                async for piece in self._pieces(body):
                    received += len(piece)
                    await _uploading.run(_take, piece, digest.update, file, arriving)
                await _uploading.run(_end, digest.hexdigest(), sha256, file, arriving)
                stored, is_new = await self._guard.run(arriving.keep, table, owner, name, file.rows, dict(file.columns))
            finally:
                try:
                    await _uploading.run(arriving.close)
                except Unavailable:
                    arriving.close()
        return _answer(stored, is_new, received, digest.hexdigest())

    def _room(self, table: DatasetTable, owner: str, name: str) -> Room:
        quota_bytes, setting = self._config.dataset_quota_bytes, "dataset_quota_bytes"
        beside_jobs = self._left_for_datasets(owner)
        if beside_jobs is not None and beside_jobs < quota_bytes:
            quota_bytes, setting = beside_jobs, "limits.stored_bytes"
        used_bytes = table.used_bytes(owner)
        left_bytes = max(quota_bytes - used_bytes, table.largest_bytes(owner, name))  # what is there may be sent again
        why = quota_text(name, left_bytes + 1, used_bytes, quota_bytes, setting)
        return Room(left_bytes, why, quota_bytes, setting)

    @contextmanager
    def _one_more(self, owner: str) -> Iterator[None]:
        if self._running[owner] >= MAX_OF_OWNER:
            raise Unavailable(f"you are uploading {MAX_OF_OWNER} data sets to this server at a time; try again")
        if self._running.total() >= MAX_UPLOADS:
            raise Unavailable(f"{MAX_UPLOADS} data sets are being uploaded to this server; try again")
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1
            self._running += Counter()  # drops owners without an upload

    async def _pieces(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The body in larger pieces; in between, check that the disk has room."""
        kept, size, since = [], 0, 0
        while True:
            chunk = await _next(body)
            if chunk is not None:
                kept.append(chunk)
                size += len(chunk)
            if size >= PIECE_BYTES or (chunk is None and size):
                yield b"".join(kept)
                since += size
                kept, size = [], 0
            if chunk is None:
                return
            if since >= LOOK_BYTES:
                await self._guard.must_have_room(NOT_STORED)
                if compat.is_stopping():
                    raise Unavailable(STOPPING)
                since = 0


async def _next(body: AsyncIterator[bytes]) -> bytes | None:
    """The next bytes of a body; None at its end."""
    # Not `asyncio.timeout`, which would end the iterator at the first look.
    waiting = asyncio.ensure_future(anext(body, None))
    deadline = time.monotonic() + SILENCE_S
    try:
        while not (await asyncio.wait({waiting}, timeout=LOOK_S))[0]:
            if compat.is_stopping():  # the host's server first waits for its connections
                raise Unavailable(STOPPING)
            if time.monotonic() > deadline:
                raise InvalidInput("body", f"no byte for {SILENCE_S:g} seconds", "a body that goes on")
        return waiting.result()
    finally:
        waiting.cancel()


def _take(piece: bytes, update: Callable[[bytes], None], file: RowFile, arriving: Arriving) -> None:
    update(piece)
    _write(file.feed(piece), file, arriving)


def _end(found: str, expected: str | None, file: RowFile, arriving: Arriving) -> None:
    if expected is not None and found != expected.lower():
        raise InvalidInput("sha256", expected, f"the SHA-256 of the body, which is {found}; it was changed or cut "
                           "short on its way")  # fmt: skip
    _write(file.finish(), file, arriving)
    arriving.sync()


def _write(rows: Iterable[FileRow], file: RowFile, arriving: Arriving) -> None:
    for row in rows:
        if not file.problem_count:
            arriving.write(row.line)
    arriving.flush()


def _answer(stored: DatasetVersion, is_new: bool, received_bytes: int, received_sha256: str) -> PushedDataset:
    return PushedDataset(
        name=stored.name, sha256=stored.sha256, rows=stored.rows, bytes=stored.bytes, columns=stored.columns,
        created_at=stored.created_at, is_new=is_new, received_bytes=received_bytes, received_sha256=received_sha256,
    )  # fmt: skip
