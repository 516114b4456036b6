"""Files of rows, read piece by piece as they arrive: JSON Lines or CSV, gzipped or not -> one JSON object per row.

A file is text in UTF-8. A row of JSON Lines is an object on a line of its own; a row of a CSV file has the header's
columns, all text, and an empty cell is null. Memory holds one row and one piece, whatever the size of the file. The
images of JSON Lines are taken out as they arrive (`rows.image_urls`): they are no part of a row's size.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, RowProblem, TooLarge, shorten
from llama_stack_provider_moe.ground.gunzip import GZIP_MAGIC, Gunzip
from llama_stack_provider_moe.spec.json_lines import encoded_row, not_text, parsed
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.values import BadRow

FileFormat = Literal["jsonl", "csv"]
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
MAX_ROW_BYTES = 4 << 20
MAX_COLUMNS = 1024  # of a CSV file
MAX_COLUMN_NAME = 256  # characters; a longer name of JSON Lines is not counted
LISTED_COLUMNS = 256  # names that are counted; a file whose rows have a name each must not fill the memory
MAX_BLANK_LINES = 100_000
_PARQUET_MAGIC = b"PAR1"
_BOM = b"\xef\xbb\xbf"


class FileRow(NamedTuple):
    """One row of a file.

    Attributes:
        number: its number from 1; blank lines do not count.
        content: the JSON object, with canonical images.
        line: `content` as a line of JSON in UTF-8, with its newline. Equal rows give equal lines.
    """

    number: int
    content: Mapping[str, object]
    line: bytes


type _Content = dict[str, object] | str | None  # of a row; text says what is wrong with it, None is a blank line


class _Line(NamedTuple):
    number: int  # from 1
    content: bytes  # without its newline


class RowFile:
    """Reads one file; its caller feeds the bytes.

    Args:
        name: the file's name for error texts.
        file_format: of the text.
        gzipped: whether the bytes are gzipped; None: look at the first two.
        max_bytes: most bytes of text, and of lines that `feed` yields.
        max_rows: most rows.
        images: takes the images of rows; None: they stay in the rows as they are.
        converts: whether rows get canonical images here; else the caller's `images.whole` gives them.

    Attributes:
        rows: number of rows so far.
        columns: number of rows with a value in each column, of the first `LISTED_COLUMNS` names that are not too long.
        problems: the first problems.
        problem_count: number of all problems so far.
    """

    def __init__(
        self,
        name: str,
        file_format: FileFormat = "jsonl",
        gzipped: bool | None = None,
        max_bytes: int = 1 << 62,
        max_rows: int = 1 << 62,
        images: ImageDoor | None = None,
        converts: bool = True,
    ) -> None:
        self._name = name
        self._gunzip = Gunzip(name) if gzipped else None
        self._is_known = gzipped is not None
        self._begin = b""
        self._lines = _Lines()
        self._csv = _Csv() if file_format == "csv" else None
        self._images = images if converts else None
        self._taker = None if images is None or file_format == "csv" else images.taker()
        self._max_bytes, self._max_rows = max_bytes, max_rows
        self._text_bytes = 0
        self._blank_lines = 0
        self._line_bytes = 0
        self.rows = 0
        self.columns: Counter[str] = Counter()
        self.problems: list[RowProblem] = []
        self.problem_count = 0

    def feed(self, piece: bytes) -> Iterator[FileRow]:
        """Yield the rows that the next piece of the file completes; go on to the end of the iterator.

        Raises:
            InvalidRows: the file can't be read any further, or has `InvalidRows.SHOWN` problems.
            InvalidInput: it is not text of the format.
            TooLarge: it has more bytes or rows than are allowed.
        """
        if not self._is_known:
            self._begin += piece
            if len(self._begin) < len(_PARQUET_MAGIC):
                return
            piece = self._look()
        yield from self._decompressed(piece)

    def finish(self) -> Iterator[FileRow]:
        """Yield the rows that the end of the file completes.

        Raises:
            InvalidRows: rows of the file are not valid.
            InvalidInput: it ends too early, or has no rows.
            TooLarge: it has more bytes or rows than are allowed.
        """
        if not self._is_known:
            yield from self._decompressed(self._look())
        if self._gunzip is not None:
            self._gunzip.finish()
        if self._taker is not None:
            yield from self._of_lines(self._lines.feed(self._taker.finish()), is_last=False)
        yield from self._of_lines(self._lines.finish(), is_last=True)
        if self.problem_count:
            raise InvalidRows(self._name, self.problems, self.problem_count, self.rows)
        if not self.rows:
            raise InvalidInput("rows", self._name, "a file with rows; this one is empty")

    def _look(self) -> bytes:
        begin, self._begin, self._is_known = self._begin, b"", True
        if begin.startswith(_PARQUET_MAGIC):
            raise InvalidInput("rows", self._name, "JSON Lines or CSV; this is a Parquet file, which "
                               "`moe-train data push` converts")  # fmt: skip
        if begin.startswith(GZIP_MAGIC):
            self._gunzip = Gunzip(self._name)
        return begin

    def _decompressed(self, piece: bytes) -> Iterator[FileRow]:
        for text in [piece] if self._gunzip is None else self._gunzip.feed(piece):
            self._text_bytes += len(text)
            self._must_fit(self._text_bytes)
            without = text if self._taker is None else self._taker.feed(text)
            yield from self._of_lines(self._lines.feed(without), is_last=False)

    def _of_lines(self, lines: Iterator[_Line], is_last: bool) -> Iterator[FileRow]:
        try:
            if self._csv is None:
                for line in lines:
                    blank = not line.content or line.content.isspace()
                    yield from self._row(line.number, None if blank else parsed(line.content))
            else:
                for number, found in self._csv.feed(lines, is_last):
                    yield from self._row(number, found)
        except _BadFile as bad:
            self._add(RowProblem(self.rows + 1, _of_line(bad.line, self.rows + 1), str(bad)))
            raise InvalidRows(self._name, self.problems, self.problem_count, self.rows + 1) from None

    def _row(self, line: int, found: _Content) -> Iterator[FileRow]:
        if found is None:
            self._blank_lines += 1
            if self._blank_lines > MAX_BLANK_LINES:
                raise _BadFile(line, f"the file has more than {MAX_BLANK_LINES:,} blank lines")
            return
        self.rows += 1
        if self.rows > self._max_rows:
            raise TooLarge(f"{self._name}: more than {self._max_rows:,} rows (`max_rows` of this server)")
        try:
            row, encoded = self._checked(found)
        except BadRow as bad:
            self._add(RowProblem(self.rows, bad.field or _of_line(line, self.rows), bad.reason))
            if self.problem_count >= InvalidRows.SHOWN:
                raise InvalidRows(self._name, self.problems, self.problem_count, self.rows) from None
            return
        self._line_bytes += len(encoded)
        self._must_fit(self._line_bytes)
        for name, value in row.items():
            if value is not None and (name in self.columns or self._lists(name)):
                self.columns[name] += 1
        yield FileRow(self.rows, row, encoded)

    def _checked(self, found: dict[str, object] | str) -> tuple[Mapping[str, object], bytes]:
        """The row with canonical images, and its line; a `BadRow` of the whole line has no field."""
        if isinstance(found, str):
            raise BadRow("", found)
        row = found if self._images is None else self._images.converted(found)
        encoded = encoded_row(row)
        if isinstance(encoded, str):
            raise BadRow("", encoded)
        left_over = None if self._images is None else self._images.left_over(encoded)
        if left_over is not None:
            raise BadRow("", left_over)
        return row, encoded

    def _lists(self, name: str) -> bool:
        return len(self.columns) < LISTED_COLUMNS and len(name) <= MAX_COLUMN_NAME

    def _add(self, problem: RowProblem) -> None:
        self.problems.append(problem)
        self.problem_count += 1

    def _must_fit(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise TooLarge(f"{self._name}: more than {self._max_bytes:,} bytes (`max_dataset_bytes` of this server)")


def loaded_row(line: bytes) -> object:
    """Return the content of a `FileRow.line`."""
    return json.loads(line)


class _BadFile(Exception):
    """The file can't be read beyond this line."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Lines:
    """Splits bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._count = 0

    def feed(self, text: bytes) -> Iterator[_Line]:
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            yield self._next(line)
        if len(self._rest) > MAX_ROW_BYTES:
            raise _too_long(self._count + 1)

    def finish(self) -> Iterator[_Line]:
        if self._rest:
            yield self._next(self._rest)

    def _next(self, line: bytes) -> _Line:
        self._count += 1
        if self._count == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(self._count)
        return _Line(self._count, line)


class _MoreNeeded(Exception):
    """The last line so far is in the middle of a row."""


class _Csv:
    """Reads CSV as RFC 4180 has it. Python's reader pulls lines; when it wants one too many, the row waits."""

    def __init__(self) -> None:
        # A limit for the whole process, which has a lower one only against memory that runs out; ours is the row's.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        self._lines: list[tuple[int, str]] = []
        self._at = 0
        self._has_ended = False
        self._reader = csv.reader(self, strict=True)
        self._header: list[str] | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._at == len(self._lines):
            if self._has_ended:
                raise StopIteration
            raise _MoreNeeded
        self._at += 1
        return self._lines[self._at - 1][1]

    def feed(self, lines: Iterator[_Line], is_last: bool) -> Iterator[tuple[int, _Content]]:
        """Yield line number and content, or problem, of each row that these lines complete."""
        bad = None
        try:
            for line in lines:
                self._lines.append((line.number, _text(line)))
        except _BadFile as found_bad:  # raised after the rows before it
            bad = found_bad
        self._has_ended = is_last and bad is None
        while (found := self._cells()) is not None:
            number, cells = found
            if not cells:
                yield number, None
            elif self._header is None:
                self._header = _header(number, cells)
            elif len(cells) != len(self._header):
                yield number, f"has {len(cells)} cells; the header has {len(self._header)} columns"
            else:
                yield number, {name: cell or None for name, cell in zip(self._header, cells, strict=True)}
        if bad is not None:
            raise bad
        del self._lines[: self._at]
        self._at = 0
        if sum(len(text) for _, text in self._lines) > MAX_ROW_BYTES:
            raise _too_long(self._lines[0][0])

    def _cells(self) -> tuple[int, list[str]] | None:
        begin = self._at
        if begin == len(self._lines):
            return None
        number = self._lines[begin][0]
        try:
            return number, next(self._reader)
        except _MoreNeeded:
            self._at = begin
            return None
        except StopIteration:
            return None
        except csv.Error as error:
            raise _BadFile(number, f"is not CSV ({error})") from None


def _header(number: int, cells: list[str]) -> list[str]:
    if len(cells) > MAX_COLUMNS:
        raise _BadFile(number, f"the header has more than {MAX_COLUMNS} columns")
    for column, name in enumerate(cells, 1):
        if not name.strip():
            raise _BadFile(number, f"column {column} of the header has no name (an index? write the file without it)")
        if len(name) > MAX_COLUMN_NAME:
            raise _BadFile(number, f"the name of column {column} has more than {MAX_COLUMN_NAME} characters")
    twice = [name for name, count in Counter(cells).items() if count > 1]
    if twice:
        raise _BadFile(number, f"the header has column {shorten(twice[0])} twice")
    if len(cells) == 1 and any(sign in cells[0] for sign in ";\t|"):
        raise _BadFile(number, f"the header {shorten(cells[0])} is one column; separate columns by commas")
    return cells


def _text(line: _Line) -> str:
    try:
        return line.content.decode() + "\n"
    except UnicodeDecodeError as error:
        raise _BadFile(line.number, not_text(error)) from None


def _too_long(line: int) -> _BadFile:
    return _BadFile(line, f"has more than {MAX_ROW_BYTES:,} bytes")


def _of_line(line: int, row: int) -> str:
    """The field of a problem: an editor's number of the line, where that is another one than the row's."""
    return "line" if line == row else f"line {line}"
