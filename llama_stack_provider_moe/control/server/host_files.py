"""Reads files that were uploaded to the host: piece by piece, in threads of our own, never whole in memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Protocol

from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows
from llama_stack_provider_moe.spec.row_files import FileFormat, FileRow, RowFile
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor

PIECE_BYTES = 1 << 20
PAGE_BYTES = 8 << 20  # of rows: a page ends there, whatever its number of rows
READ_LIMIT_S = 60.0  # longest read of one piece
_reading = Pool("moe-host-files", 4, 256, "files of the host", stuck_s=READ_LIMIT_S)


class Stream(Protocol):
    """An open file on this machine, or the body of an object in a store."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""

    def close(self) -> None:
        """Release it."""


async def pages(
    pieces: AsyncIterator[bytes],
    file_id: str,
    file_name: str,
    rows_per_page: int,
    field: str,
    images: ImageDoor | None = None,
) -> AsyncIterator[list[object]]:
    """Yield the rows of a file in pages: JSON Lines, or CSV by the file's name; gzipped or not.

    Args:
        pieces: the file's bytes.
        file_id: the host's id of the file.
        file_name: its name when it was uploaded.
        rows_per_page: most rows in a page.
        field: the caller's name for `file_id`, for error texts.
        images: takes the images of the rows.

    Raises:
        InvalidRows: rows of the file can't be read; each is named by number and line.
        InvalidInput: the file is not text in one of these forms, or has no rows.
    """
    reader = RowFile(file_id, _format_of(file_name), images=images, converts=False)
    try:
        async for piece in pieces:
            async for page in _paged(reader.feed(piece), rows_per_page):
                yield page
        async for page in _paged(reader.finish(), rows_per_page):
            yield page
    except InvalidRows:
        raise
    except InvalidInput as error:  # of the file's reader, which knows no field
        raise InvalidInput(field, file_id, error.expected) from None


async def pieces_of(open_stream: Callable[[], Stream], file_id: str) -> AsyncGenerator[bytes]:
    """Yield the bytes of a stream.

    Args:
        open_stream: opens it, in a thread.
        file_id: the host's id of the file.

    Raises:
        Unavailable: a read takes more than `READ_LIMIT_S`.
    """
    why_not = f"file {file_id!r} does not answer within {READ_LIMIT_S:g} seconds; try again"
    stream = await _reading.within(READ_LIMIT_S, why_not, open_stream)
    try:
        while piece := await _reading.within(READ_LIMIT_S, why_not, stream.read, PIECE_BYTES):
            yield piece
    finally:
        stream.close()  # of a file or a socket, which does not block


async def _paged(rows: Iterator[FileRow], rows_per_page: int) -> AsyncIterator[list[object]]:
    while page := await _reading.run(_page, rows, rows_per_page):
        yield page


def _page(rows: Iterator[FileRow], most: int) -> list[object]:
    found: list[object] = []
    size = 0
    for row in rows:
        found.append(row.content)
        size += len(row.line)
        if len(found) == most or size >= PAGE_BYTES:
            break
    return found


def _format_of(file_name: str) -> FileFormat:
    return "csv" if file_name.lower().removesuffix(".gz").endswith(".csv") else "jsonl"
