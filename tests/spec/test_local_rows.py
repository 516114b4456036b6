"""A user's files for evaluations and analyses: the forms that an upload has, and the numbers of their rows."""

import gzip
import json
from pathlib import Path

import pytest

from llama_stack_provider_moe.errors import InvalidInput, InvalidRows
from llama_stack_provider_moe.spec.local_rows import evaluation_rows

APART = "first\u2028second\u0085third\u000bfourth"  # characters at which Python's splitlines splits, and JSON does not
ASKED = {"messages": [{"role": "user", "content": APART}]}


def read(path: Path) -> list[object]:
    return [json.loads(line) for line in evaluation_rows(path, "--safe", "conversation", answered=False)]


def holding(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_row_is_a_line_whatever_characters_its_text_has(tmp_path: Path) -> None:
    line = json.dumps(ASKED, ensure_ascii=False).replace("\x0b", "\\u000b").encode()
    assert read(holding(tmp_path, "rows.jsonl", line + b"\r\n\n" + line + b"\n")) == [ASKED, ASKED]


@pytest.mark.parametrize("packed", [False, True])
def test_csv_and_gzip(tmp_path: Path, packed: bool) -> None:
    content = f'prompt\n"{APART}"\n'.encode()
    path = holding(tmp_path, "rows.csv" + ".gz" * packed, gzip.compress(content) if packed else content)
    assert read(path) == [ASKED]


def test_all_problems_have_their_rows_numbers(tmp_path: Path) -> None:
    good = json.dumps(ASKED).encode()
    path = holding(tmp_path, "rows.jsonl", b"\n".join([good, b'{"messages": []}', b"", b"nothing", good, b'{"a": 1}']))
    with pytest.raises(InvalidRows) as found:
        read(path)
    assert (found.value.count, found.value.total_rows) == (3, 5)
    assert [(problem.row, problem.field) for problem in found.value.problems] == [
        (2, "messages"), (3, "line 4"), (5, "row")
    ]  # fmt: skip


def test_many_problems_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRows, match=r"45 problem\(s\) in 45 row\(s\): row 1: .*; and 25 more"):
        read(holding(tmp_path, "rows.jsonl", b'{"messages": []}\n' * 45))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a file with rows; this one is empty"),
        (gzip.compress(b"{}", mtime=0)[:-4], "a whole gzip file; this one ends in the middle"),
        (b"PAR1....", "JSON Lines or CSV; this is a Parquet file"),
    ],
)
def test_a_file_that_has_no_rows_is_named_with_its_option(root: Path, content: bytes, expected: str) -> None:
    path = holding(root, "rows.jsonl", content)
    with pytest.raises(InvalidInput) as found:
        read(path)
    assert str(found.value).startswith(f"--safe: {str(path)!r} is not valid; expected {expected}")
