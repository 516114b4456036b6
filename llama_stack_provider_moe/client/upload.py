"""A file of rows -> the body of an upload, piece by piece: JSON Lines and CSV as they are, Parquet as JSON Lines.

Rows that name image files (`images`) or have their bytes get them as `data:` URLs.
"""

import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import date, time
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, cast, get_args

from llama_stack_provider_moe.client.images import Faults, Read, image_files
from llama_stack_provider_moe.errors import InvalidInput, shorten
from llama_stack_provider_moe.ground.gunzip import GZIP_MAGIC

SourceFormat = Literal["jsonl", "csv", "parquet"]
SOURCE_FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
STANDARD_INPUT = "-"
_BY_SUFFIX: dict[str, SourceFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_TYPES: dict[SourceFormat, str] = {"jsonl": "application/jsonl", "csv": "text/csv", "parquet": "application/jsonl"}
JSONL_TYPE = _TYPES["jsonl"]
_PIECE_BYTES = 1 << 20
_PARQUET_ROWS = 1000  # converted at a time
_ROWS_WITH_BYTES = 16


class Upload:
    """A file that is being sent. `body` yields it once; the other attributes say how far that is.

    Attributes:
        content_type: media type of the body.
        content_encoding: `gzip`, or None.
        total: size of the file in bytes, or in rows for Parquet; None if it is not known.
        done: as much of it as was read.
        rows: number of rows that were read; None if only the server can tell.
        sent_bytes: size of the body so far.
    """

    def __init__(self, pieces: Iterator[bytes], file_format: SourceFormat, gzipped: bool, total: int | None) -> None:
        self._pieces = pieces
        self.content_type = _TYPES[file_format]
        self.content_encoding = "gzip" if gzipped else None
        self.counts_rows = file_format == "parquet"
        self.total = total
        self.done = 0
        self.rows = 0 if file_format != "csv" and not gzipped else None
        self.sent_bytes = 0
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Checksum of the body so far."""
        return self._sha256.hexdigest()

    def body(self, tick: Callable[[], None]) -> Iterator[bytes]:
        """Yield the body; call `tick` after each piece."""
        for piece in self._pieces:
            self._sha256.update(piece)
            self.sent_bytes += len(piece)
            if self.rows is not None:
                self.rows += piece.count(b"\n")
            self.done = (self.rows or 0) if self.counts_rows else self.sent_bytes
            yield piece
            tick()


@contextmanager
def opened(file: str, file_format: SourceFormat | None, images: str | None = None) -> Iterator[Upload]:
    """Open a file of rows.

    Args:
        file: its path; - for standard input.
        file_format: its format; None: by the end of its name, and JSON Lines on standard input.
        images: folder or tar file of the images that rows name; None: rows name no files.

    Raises:
        InvalidInput: the file can't be read, or its format is not known.
    """
    found = file_format or _format_of(file)
    if images is not None and found == "csv":
        raise InvalidInput("--images", images, "rows of JSON Lines or Parquet: a cell of CSV holds no list of parts")
    with ExitStack() as stack:
        read_image = stack.enter_context(image_files(images))
        source = sys.stdin.buffer if file == STANDARD_INPUT else stack.enter_context(_open(file))
        if found == "parquet":
            if not source.seekable():  # the index of a Parquet file is at its end
                source = _spooled(source, stack)
            table = _parquet(source, file)
            yield Upload(_rows_of(table, file, read_image), found, gzipped=False, total=table.metadata.num_rows)
            return
        if read_image is not None:
            text = cast("BinaryIO", gzip.open(source)) if file.lower().endswith(".gz") else source  # noqa: SIM115
            yield Upload(_with_images(text, file, read_image), found, gzipped=False, total=None)
            return
        first = _read(source, _PIECE_BYTES, file)
        size = 0 if file == STANDARD_INPUT else os.fstat(source.fileno()).st_size  # 0 for a pipe, too
        yield Upload(_bytes_of(first, source, file), found, first.startswith(GZIP_MAGIC), size or None)


def lines_of(rows: Iterable[Mapping[str, object]]) -> Iterator[bytes]:
    """Yield rows as JSON Lines, in pieces.

    Raises:
        InvalidInput: a row is no JSON object.
    """
    kept, size = [], 0
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InvalidInput(f"rows[{number - 1}]", row, "a dictionary")
        kept.append(_line(dict(row), number, "rows"))
        size += len(kept[-1])
        if size >= _PIECE_BYTES:
            yield b"".join(kept)
            kept, size = [], 0
    yield b"".join(kept)


def _format_of(file: str) -> SourceFormat:
    if file == STANDARD_INPUT:
        return "jsonl"
    name = PurePath(file.lower().removesuffix(".gz"))
    if name.suffix not in _BY_SUFFIX:
        raise InvalidInput("FILE", file, "--format jsonl, csv or parquet as well, or a name that ends in "
                           ".jsonl, .jsonl.gz, .csv or .parquet")  # fmt: skip
    return _BY_SUFFIX[name.suffix]


def _open(file: str) -> BinaryIO:
    try:
        return Path(file).expanduser().open("rb")
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput("FILE", file, f"a file that you can read ({_brief(error)})") from None


def _read(source: BinaryIO, size: int, file: str) -> bytes:
    try:
        return source.read(size)
    except OSError as error:
        raise InvalidInput("FILE", file, f"a file that you can read ({error.strerror})") from None


def _bytes_of(first: bytes, source: BinaryIO, file: str) -> Iterator[bytes]:
    piece = first
    while piece:
        yield piece
        piece = _read(source, _PIECE_BYTES, file)


def _spooled(source: BinaryIO, stack: ExitStack) -> BinaryIO:
    copy: BinaryIO = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
    shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def _parquet(source: BinaryIO, file: str) -> Any:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidInput("FILE", file, "JSON Lines or CSV, for Parquet needs pyarrow, which is not installed: pip "
                           "install pyarrow") from None  # fmt: skip
    arrow = import_module("pyarrow")
    try:
        return parquet.ParquetFile(source)
    except (arrow.ArrowException, OSError) as error:
        raise InvalidInput("FILE", file, f"a Parquet file ({_brief(error)})") from None


def _with_images(source: BinaryIO, file: str, read_image: Read) -> Iterator[bytes]:
    number, faults = 0, Faults()
    try:
        for line in source:
            if line.isspace():
                continue
            number += 1
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidInput("FILE", file, f"JSON on each line; row {number} has none ({error})") from None
            if not isinstance(row, dict):
                raise InvalidInput("FILE", file, f"a JSON object on each line; row {number} is none")
            done = faults.inlined(row, number, read_image)
            if done is not None:
                yield _line(done, number, file)
    except OSError as error:
        raise InvalidInput("FILE", file, f"a file that you can read ({_brief(error)})") from None
    faults.check()


def _rows_of(table: Any, file: str, read_image: Read | None) -> Iterator[bytes]:
    arrow = import_module("pyarrow")
    number, faults = 0, Faults()
    has_bytes = "binary" in str(table.schema_arrow)
    batches = table.iter_batches(batch_size=_ROWS_WITH_BYTES if has_bytes else _PARQUET_ROWS)
    while True:
        try:
            batch = next(batches, None)
        except (arrow.ArrowException, OSError) as error:
            raise InvalidInput("FILE", file, f"a whole Parquet file ({_brief(error)})") from None
        if batch is None:
            break
        lines = []
        for row in batch.to_pylist():
            number += 1
            done = faults.inlined(row, number, read_image) if has_bytes or read_image else row
            if done is not None:
                lines.append(_line(done, number, file))
        if not faults:
            yield b"".join(lines)
    faults.check()


def _line(row: dict[str, object], number: int, file: str) -> bytes:
    try:
        return _encoded(row)
    except ValueError:
        row = {name: _without_nan(value) for name, value in row.items()}
    except TypeError:
        pass
    for name, value in row.items():
        try:
            _encoded({name: value})
        except (TypeError, ValueError) as error:
            raise InvalidInput("FILE", file, f"columns of text, numbers, lists and objects; row {number} has {name} "
                               f"{shorten(value)} ({error})") from None  # fmt: skip
    return _encoded(row)


def _encoded(row: dict[str, object]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_moment).encode() + b"\n"


def _moment(value: object) -> str:
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a value of JSON")


def _without_nan(value: object) -> object:
    """The value with None for NaN, by which data frames mark a number that is missing."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return value


def _brief(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0][:200]
