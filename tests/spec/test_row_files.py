"""Files of rows: every way to write the same rows gives the same lines, however the file is cut into pieces."""

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import pytest

from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, TooLarge
from llama_stack_provider_moe.spec import row_files
from llama_stack_provider_moe.spec.row_files import FileFormat, FileRow, RowFile, loaded_row

ROWS: list[dict[str, object]] = [
    {"prompt": 'Say "hi"', "completion": "Grüße, 世界 🙂"},
    {"prompt": "two\nlines", "completion": None},
    {"prompt": "a, b", "completion": "\u2028 stays inside a row"},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = (
    'prompt,completion\r\n"Say ""hi""","Grüße, 世界 🙂"\r\n"two\nlines",\r\n\r\n"a, b",\u2028 stays inside a row\r\n'
).encode()
LINES = [json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for row in ROWS]


def zipped(content: bytes) -> bytes:
    """Gzipped without the time: it would stand in the names of tests, which all processes must agree on."""
    return gzip.compress(content, mtime=0)


def read(content: bytes, file_format: FileFormat = "jsonl", size: int | None = None, **limits: int) -> list[FileRow]:
    file = RowFile("mine", file_format, **limits)  # type: ignore[arg-type]

    def rows() -> Iterator[FileRow]:
        step = size or max(1, len(content))
        for start in range(0, len(content), step):
            yield from file.feed(content[start : start + step])
        yield from file.finish()

    found = list(rows())
    assert file.rows == len(found)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
@pytest.mark.parametrize(
    ("content", "file_format"),
    [
        (JSONL, "jsonl"), (JSONL.rstrip(b"\n"), "jsonl"), (b"\xef\xbb\xbf" + JSONL, "jsonl"),
        (JSONL.replace(b"\n", b"\r\n"), "jsonl"), (b"\n \n" + JSONL.replace(b"\n", b"\n\n"), "jsonl"),
        (b"".join(json.dumps(row, ensure_ascii=False, indent=None).encode() + b"\n" for row in ROWS), "jsonl"),
        (zipped(JSONL), "jsonl"), (zipped(JSONL[:50]) + zipped(JSONL[50:]) + bytes(9), "jsonl"),
        (CSV, "csv"), (CSV.rstrip(b"\r\n"), "csv"), (b"\xef\xbb\xbf" + CSV, "csv"), (zipped(CSV), "csv"),
    ],
)  # fmt: skip
def test_the_same_rows_give_the_same_lines(content: bytes, file_format: FileFormat, size: int | None) -> None:
    found = read(content, file_format, size)
    assert [row.line for row in found] == LINES
    assert [row.content for row in found] == ROWS == [loaded_row(row.line) for row in found]
    assert [row.number for row in found] == [1, 2, 3]


def test_pieces_of_any_size_change_nothing() -> None:
    dice = random.Random(7)
    texts = ["plain", 'with "quotes"', "a\nb", "x,y", "", "\r\n", "世界"]
    rows: list[dict[str, object]] = [{"a": dice.choice(texts) or None, "b": f"{n}"} for n in range(200)]

    def cell(value: object) -> str:
        return '"' + str(value).replace('"', '""') + '"' if value is not None else ""

    content = ("a,b\n" + "".join(f"{cell(row['a'])},{cell(row['b'])}\n" for row in rows)).encode()
    for _ in range(20):
        assert [row.content for row in read(content, "csv", dice.randint(1, 300))] == rows


def test_columns_count_values() -> None:
    file = RowFile("mine")
    list(file.feed(b'{"a": 1, "b": null}\n{"a": 2, "c": []}\n'))
    assert file.columns == {"a": 2, "c": 1}
    file = RowFile("mine")
    for number in range(2 * row_files.LISTED_COLUMNS):
        list(file.feed(b'{"column%d": 1}\n' % number))
    assert len(file.columns) == row_files.LISTED_COLUMNS
    file = RowFile("mine")
    list(file.feed(b'{"%s": 1, "short": 2}\n' % (b"x" * 257)))
    assert file.columns == {"short": 1}, "long names must not fill the memory either"


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "is not UTF-8 (byte 8 of the line)"),
        (b'{"a": 1', "is not JSON (Expecting ',' delimiter at character 8)"),
        (b"[1, 2]", "holds [1, 2]; expected a JSON object on each line; write each item on its own line"),
        (b'{"a": "\t"}', "is not JSON (Invalid control character at character 8)"),
        (b'"text"', "holds 'text'; expected a JSON object on each line"),
        (b"{}", "has no columns"),
        (b'{"a": NaN}', "is not JSON (NaN is not JSON; expected null or a number)"),
        (b'{"a": [-Infinity]}', "is not JSON (-Infinity is not JSON; expected null or a number)"),
        (b'{"a": 1e999}', "has a number that is too large"),
        (b'{"a": 1, "a": 2}', "is not JSON (key 'a' is there twice)"),
        (b'{"m": [{"role": "user", "role": "system"}]}', "is not JSON (key 'role' is there twice)"),
        (b'{"a": "\\ud83d"}', "contains half of a surrogate pair, which is not valid text"),
        (b'{"\\udc00": 1}', "contains half of a surrogate pair, which is not valid text"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has a number that is too large"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_row(line: bytes, reason: str, size: int | None) -> None:
    if size is not None and len(line) > 1000:
        size = 1000
    for content, where in ((LINES[0] + line + b"\n" + LINES[1], "row 2: line: "),
                           (LINES[0] + b"\n\n" + line, "row 2: line 4: ")):  # fmt: skip
        with pytest.raises(InvalidRows) as raised:
            read(content, size=size)
        assert f"{where}{reason}" in str(raised.value)
        assert raised.value.count == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,b\n1,2\n3\n", "row 2: line 3: has 1 cells; the header has 2 columns"),
        (b"a,b\n1,2\n3,4,5\n", "row 2: line 3: has 3 cells; the header has 2 columns"),
        (b'a,b\n"1\n2",3\n"x"y,4\n', "row 2: line 4: is not CSV (',' expected after '\"')"),
        (b'a,b\n1,2\n"no end,3\n4,5\n', "row 2: line 3: is not CSV (unexpected end of data)"),
        (b"a,b\n1,2\n\xff,3\n", "row 2: line 3: is not UTF-8 (byte 1 of the line)"),
        (b",b\n1,2\n", "column 1 of the header has no name (an index? write the file without it)"),
        (b"a,b,a\n1,2,3\n", "the header has column 'a' twice"),
        (b"a;b\n1;2\n", "the header 'a;b' is one column; separate columns by commas"),
        (b",".join(b"c%d" % n for n in range(1025)) + b"\n", "the header has more than 1024 columns"),
        (b"a," + b"b" * 257 + b"\n", "the name of column 2 has more than 256 characters"),
    ],
)  # fmt: skip
def test_a_bad_csv_file_is_named_by_its_row(content: bytes, reason: str) -> None:
    for size in (1, 5, None):
        with pytest.raises(InvalidRows) as raised:
            read(content, "csv", size)
        assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a file with rows; this one is empty"), (b"\n\n", "this one is empty"),
        (zipped(b""), "this one is empty"), (zipped(JSONL)[:-9], "this one ends in the middle"),
        (zipped(JSONL)[:40] + b"!!!!" + zipped(JSONL)[44:], "this one is damaged"),
        (zipped(JSONL) + b"junk", "this one is damaged"),
        (b"PAR1\x15\x04", "this is a Parquet file, which `moe-train data push` converts"),
    ],
)  # fmt: skip
def test_another_file_is_refused(content: bytes, reason: str) -> None:
    for size in (1, None):
        with pytest.raises(InvalidInput) as raised:
            read(content, size=size)
        assert reason in str(raised.value)


def test_a_csv_file_of_a_header_alone_is_empty() -> None:
    with pytest.raises(InvalidInput, match="this one is empty"):
        read(b"a,b\n", "csv")


def test_all_problems_are_counted_up_to_what_is_shown() -> None:
    with pytest.raises(InvalidRows) as raised:
        read(LINES[0] + b"1\n2\n" + LINES[1])
    assert (raised.value.count, raised.value.total_rows) == (2, 4)
    with pytest.raises(InvalidRows) as raised:
        read(b"1\n" * 1000)
    assert (raised.value.count, raised.value.total_rows) == (InvalidRows.SHOWN, InvalidRows.SHOWN), "reading stops"


@pytest.mark.parametrize("file_format", ["jsonl", "csv"])
def test_a_row_has_a_limit(file_format: FileFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1000)
    head = b"a\n" if file_format == "csv" else b""
    good = b"x\n" if file_format == "csv" else b'{"a": "x"}\n'
    for end in (b"\n" + good, b""):
        for size in (64, None):
            with pytest.raises(InvalidRows, match=r"row 2: line.*: has more than 1,000 bytes"):
                read(head + good + b"y" * 1001 + end, file_format, size)
    if file_format == "csv":
        with pytest.raises(InvalidRows, match="row 2: line 3: has more than 1,000 bytes"):
            read(head + good + b'"' + b"y\n" * 2000, file_format, 64)


def test_limits_count_the_text_and_the_lines() -> None:
    size = len(JSONL)
    assert len(read(JSONL, max_bytes=size, max_rows=3)) == 3
    for content in (JSONL, zipped(JSONL)):
        with pytest.raises(TooLarge, match=f"more than {size - 1:,} bytes"):
            read(content, max_bytes=size - 1)
    with pytest.raises(TooLarge, match="more than 2 rows"):
        read(JSONL, max_rows=2)
    wide = ("c" * 200).encode() + b"\n" + b"1\n" * 50
    assert len(wide) < 1000
    with pytest.raises(TooLarge):
        read(wide, "csv", max_bytes=1000)


def peak_of_bombs() -> int:
    """Refuse two small files that would be large; the most memory that it took, in bytes."""
    bombs = [gzip.compress(line * (64 << 20 >> 20)) for line in (bytes(1 << 20), b" " * ((1 << 20) - 1) + b"\n")]
    assert max(map(len, bombs)) < 1 << 20
    tracemalloc.start()
    with pytest.raises(InvalidRows, match="has more than 4,194,304 bytes"):
        read(bombs[0])
    with pytest.raises(TooLarge):
        read(bombs[1], max_bytes=32 << 20)
    return tracemalloc.get_traced_memory()[1]


def test_a_gzip_bomb_needs_little_memory() -> None:
    # In a process of its own: what threads of other tests allocate meanwhile would count too.
    code = f"from {__name__} import peak_of_bombs; print(peak_of_bombs())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 20
    with pytest.raises(InvalidRows, match="more than 100,000 blank lines"):
        read(gzip.compress(b"\n" * (10 << 20)))
