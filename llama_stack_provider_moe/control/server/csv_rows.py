"""CSV files that are registered on the host: read piece by piece, with the reader that its provider localfs uses."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Protocol

from llama_stack_provider_moe.ground.small_files import open_regular

_REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # http:, s3:, data: ...


class Frame(Protocol):
    """A piece of a file, of which only this is used."""

    def to_dict(self, orient: str) -> list[object]: ...


def opened(uri: str, rows_per_page: int) -> AbstractContextManager[Iterator[Frame]]:
    """Open a file; its pieces have so many rows."""
    pandas = import_module("pandas")  # the reader that localfs uses; the host's extra installs it
    if not _REMOTE.match(uri):
        open_regular(Path(uri.removeprefix("file://"))).close()  # a FIFO would block the thread forever
    # Every cell is text ("42" and "None" are ordinary answers), and an empty cell counts as missing.
    chunks: AbstractContextManager[Iterator[Frame]] = pandas.read_csv(
        uri, chunksize=rows_per_page, dtype=str, keep_default_na=False, na_values=[""]
    )
    return chunks


def page(chunks: Iterator[Frame]) -> list[object] | None:
    """Return the next rows; None at the end."""
    chunk = next(chunks, None)
    return None if chunk is None else chunk.to_dict("records")
