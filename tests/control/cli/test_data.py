"""`moe-train data`: files of every format reach our own router behind uvicorn; lists, deletion, errors, progress."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from llama_stack_provider_moe.client import upload as uploads
from llama_stack_provider_moe.control.cli import upload_progress
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.show import size
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import ServerRefused
from tests.control.cli.test_live_bar import Terminal, plain
from tests.support.cli_support import MOE_TRAIN, Done, moe_train
from tests.support.host_support import BODY, ask, over_http, serving_in_process

pyarrow = import_module("pyarrow")
parquet = import_module("pyarrow.parquet")

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Frage {number}?", "completion": f"Antwort {number}, 世界"} for number in range(2500)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
STORED = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in ROWS).encode()
VERSION = hashlib.sha256(STORED).hexdigest()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path / "server", dataset_quota_bytes=1 << 30) as made:
        yield made


@pytest.fixture(autouse=True)
def url(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with over_http(service) as found:
        monkeypatch.setenv("MOE_TRAIN_URL", found)
        yield found


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_of(rows: list[dict[str, Any]], path: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    return path


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith((".parquet", ".pq")):
        return parquet_of(ROWS, path)
    content = csv_of(ROWS) if ".csv" in name else JSONL
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.ndjson", "rows.JSONL", "rows.jsonl.gz", "rows.csv", "rows.csv.gz", "rows.parquet", "rows.pq"],
)
def test_every_format_arrives_as_the_same_rows(service: PostTrainingService, tmp_path: Path, name: str) -> None:
    done = moe_train("data", "push", str(written(tmp_path, name)), "--name", "mine")
    assert done.code == Exit.OK, done.err
    assert done.out.splitlines() == [
        f"data set mine, version {VERSION[:12]}: 2,500 rows, {size(len(STORED))}",
        "columns: prompt, completion",
        f"in a job: data.dataset_id: mine, or mine@{VERSION[:12]} for this version",
    ]
    (stored,) = service.config.datasets_dir.glob("*/rows.jsonl")
    assert stored.read_bytes() == STORED
    answer = ask(service, "POST", "/jobs/validate", json=BODY | {"data": {"dataset_id": "mine"}})
    assert answer.json()["sources"]["train"]["version"] == VERSION


def by_pipe(content: bytes, *words: str) -> Done:
    done = subprocess.run([*MOE_TRAIN, *words], input=content, capture_output=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize(
    ("name", "words"),
    [("rows.jsonl", ()), ("rows.jsonl.gz", ()), ("rows.csv", ("--format", "csv")), ("rows.csv.gz", ("--format", "csv")),
     ("rows.parquet", ("--format", "parquet"))],
)  # fmt: skip
def test_standard_input(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    done = by_pipe(written(tmp_path, name).read_bytes(), "data", "push", "-", "--name", "mine", "--json", *words)
    assert done.code == Exit.OK, done.err
    assert (done.document["sha256"], done.document["is_new"], done.err) == (VERSION, True, "")


def test_a_pushed_file_again_is_the_same_version(tmp_path: Path) -> None:
    path = str(written(tmp_path, "rows.jsonl"))
    assert moe_train("data", "push", path, "--name", "mine", "--json").document["is_new"]
    done = moe_train("data", "push", path, "--name", "mine")
    assert "the same rows were stored before" in done.out


def test_list_show_and_delete(tmp_path: Path) -> None:
    assert moe_train("data", "ls").out.splitlines() == ["no data sets", "0 B of 1.07 GB used"]
    path = tmp_path / "rows.jsonl"
    for rows in (ROWS, [*ROWS, {"prompt": "more", "completion": "", "source": None}], [{"text": "x"}]):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        moe_train("data", "push", str(path), "--name", "mine" if len(rows) > 1 else "other")
    heads, mine, other, used = moe_train("data", "ls").out.splitlines()
    assert heads.split() == ["NAME", "VERSION", "ROWS", "SIZE", "CREATED", "VERSIONS", "ALL", "VERSIONS"]
    assert (mine.split()[0], mine.split()[2], other.split()[0]) == ("mine", "2,501", "other")
    assert used.endswith(" of 1.07 GB used")
    assert [each["name"] for each in moe_train("data", "ls", "--after", "mine", "--json").document["data"]] == ["other"]
    assert "there are more: moe-train data ls --after mine" in moe_train("data", "ls", "--limit", "1").out
    current, heads, newer, older = moe_train("data", "show", "mine").out.splitlines()
    newest = moe_train("data", "show", "mine", "--json").document["versions"][0]
    assert current == f"mine: jobs read version {newest['sha256'][:12]}, unless they name another"
    assert newer.endswith("prompt, completion")
    assert newest["columns"] == {"prompt": 2501, "completion": 2501}, "nulls do not count"
    assert older.split()[0] == VERSION[:12]
    done = moe_train("data", "rm", f"mine@{VERSION[:8]}")
    assert (done.code, done.out.startswith(f"data set mine: version {VERSION[:12]} deleted, ")) == (Exit.OK, True)
    assert moe_train("data", "rm", "mine", "--json").document["versions"] == [newest["sha256"]]
    for words in (("show", "mine"), ("rm", "mine")):
        done = moe_train("data", *words)
        assert (done.code, done.err) == (Exit.REFUSED, "moe-train: you have no data set 'mine' on this server\n")


def test_rows_that_the_server_refuses_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL + b"\nnot JSON\n[]\n" + JSONL)
    done = moe_train("data", "push", str(path), "--name", "mine")
    assert done.code == Exit.REFUSED
    assert done.err.splitlines() == [
        "moe-train: dataset 'mine': 2 problem(s) in 5002 row(s):",
        "  row 2501: line 2502: is not JSON (Expecting value at character 1)",
        "  row 2502: line 2503: holds []; expected a JSON object on each line; write each item on its own line",
    ]
    assert moe_train("data", "ls", "--json").document["data"] == []
    done = moe_train("data", "push", str(path), "--name", "mine", "--json")
    assert (done.error["status"], done.error["exit_code"]) == (400, 2)


@pytest.mark.parametrize(
    ("name", "content", "words", "message"),
    [
        ("rows.txt", b"{}", (), "expected --format jsonl, csv or parquet as well, or a name that ends in .jsonl"),
        ("rows.jsonl", b"{}", ("--format", "xml"), "--format: 'xml' is not valid; expected one of jsonl, csv, parquet"),
        ("gone.jsonl", None, (), "expected a file that you can read (No such file or directory)"),
        ("rows.parquet", b"PAR1 but not really", (), "expected a Parquet file ("),
        ("rows.jsonl", b"", (), "expected a file with rows; this one is empty"),
        ("rows.jsonl", b"PAR1 after all", (), "this is a Parquet file"),
    ],
)  # fmt: skip
def test_a_file_that_can_not_be_sent(
    tmp_path: Path, name: str, content: bytes | None, words: tuple[str, ...], message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    done = moe_train("data", "push", str(path), "--name", "mine", *words)
    assert (done.code, message in done.err) == (Exit.REFUSED, True), done.err


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    done = moe_train("data", "push", str(tmp_path), "--format", "jsonl", "--name", "mine")
    assert (done.code, "(Is a directory)" in done.err) == (Exit.REFUSED, True), done.err


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../jobs"])
def test_a_name_never_leads_to_another_route(tmp_path: Path, name: str) -> None:
    path = str(written(tmp_path, "rows.jsonl"))
    for words in (("push", path, "--name", name), ("show", name), ("rm", name)):
        assert moe_train("data", *words).code == Exit.REFUSED


def test_values_of_parquet_that_json_lacks(tmp_path: Path) -> None:
    moment = datetime(2026, 11, 29, 6, 0, tzinfo=UTC)
    rows = [{"text": "a", "when": moment, "score": 0.5, "tags": ["x"], "who": {"name": "n", "age": float("nan")}},
            {"text": "b", "when": moment, "score": float("nan"), "tags": None, "who": None}]  # fmt: skip
    path = str(parquet_of(rows, tmp_path / "rows.parquet"))
    done = moe_train("data", "push", path, "--name", "mine", "--json")
    assert done.document["columns"] == {"text": 2, "when": 2, "score": 1, "tags": 1, "who": 1}
    with uploads.opened(path, None) as upload:
        sent = [json.loads(line) for line in b"".join(upload.body(lambda: None)).splitlines()]
    assert sent[0] == {"text": "a", "when": "2026-11-29T06:00:00+00:00", "score": 0.5, "tags": ["x"],
                       "who": {"name": "n", "age": None}}  # fmt: skip
    assert sent[1]["score"] is None
    bad = str(
        parquet_of([{"text": "a", "digest": None}, {"text": "b", "digest": b"\x89PNG"}], tmp_path / "bad.parquet")
    )
    done = moe_train("data", "push", bad, "--name", "mine")
    assert done.code == Exit.REFUSED
    assert "row 2 has digest b'\\x89PNG' (bytes is not a value of JSON)" in done.err
    infinite = str(parquet_of([{"score": float("inf")}], tmp_path / "inf.parquet"))
    assert "row 1 has score inf (" in moe_train("data", "push", infinite, "--name", "mine").err


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(written(tmp_path, "rows.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = moe_train("data", "push", path, "--name", "mine")
    assert done.code == Exit.REFUSED
    assert "Parquet needs pyarrow, which is not installed: pip install pyarrow" in done.err


def test_a_refused_file_is_not_sent_to_its_end(url: str) -> None:
    piece, sent = b"[]\n" * 20_000, 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100_000):
            sent += 1
            yield piece

    with Client(url) as server, pytest.raises(ServerRefused, match="expected a JSON object on each line"):
        server.push_dataset("mine", body(), "application/jsonl", None)
    assert sent < 10_000


def test_what_arrives_is_compared_with_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged: a proxy that changes the body, between the command and the server."""
    push = Client.push_dataset

    def changed(self: Client, name: str, body: Iterator[bytes], *form: Any) -> Any:
        return push(self, name, (piece.replace(b"Frage 7?", b"Frage 8?") for piece in body), *form)

    monkeypatch.setattr(Client, "push_dataset", changed)
    done = moe_train("data", "push", str(written(tmp_path, "rows.jsonl")), "--name", "mine")
    assert done.code == Exit.REFUSED
    assert f"the server received {len(JSONL)} bytes with SHA-256 " in done.err
    assert "Delete what it stored: moe-train data rm mine@" in done.err


def test_no_server(tmp_path: Path) -> None:
    path = str(written(tmp_path, "rows.jsonl"))
    done = moe_train("data", "push", path, "--name", "mine", "--url", "http://127.0.0.1:9")
    assert (done.code, "no server answers" in done.err) == (Exit.LOST, True)


def an_upload(name: str, folder: Path) -> Any:
    return uploads.opened(str(written(folder, name)), None)


@pytest.mark.parametrize(
    ("name", "told"),
    [("rows.jsonl", r"[\d.]+ kB of [\d.]+ kB \(100%\), 2,500 rows"), ("rows.csv", r"[\d.]+ kB of [\d.]+ kB \(100%\)$"),
     ("rows.jsonl.gz", r"[\d.]+ kB of [\d.]+ kB \(100%\)$"), ("rows.parquet", r"[\d.]+ kB \(100%\), 2,500 rows")],
)  # fmt: skip
def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    monkeypatch.setattr(upload_progress, "LINE_S", 0.0)
    notes: list[str] = []
    screen = Screen(as_json=False)
    monkeypatch.setattr(screen, "note", notes.append)
    with an_upload(name, tmp_path) as upload, upload_progress.shown(screen, upload) as tick:
        for _ in upload.body(tick):
            pass
    assert notes
    assert re.match("sent " + told, notes[-1]), notes[-1]


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(as_json=False)
    assert screen.live
    console = Console(file=terminal, force_terminal=True, width=100, markup=False, highlight=False)
    monkeypatch.setattr(screen, "out", console)
    with an_upload("rows.jsonl", tmp_path) as upload, upload_progress.shown(screen, upload) as tick:
        for _ in upload.body(tick):
            pass
        tick()
    last = [line for line in plain(terminal.getvalue()).splitlines() if line.strip()][-1]
    assert "sending" in last
    assert "(100%), 2,500 rows" in last


def test_the_command_does_not_import_torch_or_pyarrow() -> None:
    code = ("import sys; from llama_stack_provider_moe.control.cli import main; main(['data', 'ls', '--json']); "
            "sys.exit(str({'torch', 'pyarrow', 'pandas', 'datasets'} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
                          env=dict(os.environ))  # fmt: skip
    assert done.stderr.strip() == "set()"


def test_the_details_of_a_job_name_the_version(tmp_path: Path, url: str) -> None:
    moe_train("data", "push", str(written(tmp_path, "rows.jsonl")), "--name", "mine")
    body = BODY | {"data": {"dataset_id": "mine", "validation_dataset_id": "good"}}
    job = httpx.post(url + "/v1alpha/post-training/jobs", json=body, timeout=60).json()["job_uuid"]
    assert f"mine@{VERSION[:12]} (uploaded), good (host data set)" in moe_train("status", job).out
