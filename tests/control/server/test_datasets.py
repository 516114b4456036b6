"""Uploaded data sets over their routes: forms, versions, owners, limits; what is refused leaves nothing."""

import gzip
import hashlib
import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.dataset_files import ROWS_FILE
from tests.support.host_support import (
    BODY,
    ROWS,
    app_of,
    ask,
    caller,
    folder_of,
    get_raw,
    must_be_documented,
    serving_in_process,
)

JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
STORED = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in ROWS).encode()
CSV = ("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)).encode()
VERSION = hashlib.sha256(STORED).hexdigest()
QUOTA, LARGEST, MAX_ROWS = 200_000, 100_000, 1000


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, max_dataset_bytes=LARGEST, dataset_quota_bytes=QUOTA, max_rows=MAX_ROWS) as made:
        yield made


def push(
    service: PostTrainingService, name: str = "mine", content: bytes = JSONL, query: str = "", **headers: str
) -> httpx.Response:
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return ask(service, "PUT", f"/datasets/{name}{query}", content=content, headers=sent)


def pushed(service: PostTrainingService, name: str = "mine", content: bytes = JSONL) -> str:
    """The version's checksum."""
    answer = push(service, name, content)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["sha256"])


def text(content: str, size: int = 0) -> bytes:
    """A file of one row."""
    return json.dumps({"prompt": "?", "completion": content.ljust(size)}).encode()


def files(service: PostTrainingService) -> list[Path]:
    """Every file and folder of data sets but those that are always there."""
    root = service.config.datasets_dir
    return sorted(path for path in root.rglob("*") if path not in (root / ".lock", root / "incoming"))


def refusal(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (JSONL, {}), (JSONL, {"content_type": "application/jsonl"}), (STORED, {"content_type": "text/plain"}),
        (JSONL, {"content_type": "application/x-ndjson; charset=utf-8"}),
        (gzip.compress(JSONL), {"content_type": "application/jsonl", "content_encoding": "gzip"}),
        (gzip.compress(JSONL), {"content_type": "application/gzip"}), (gzip.compress(JSONL), {}),
        (CSV, {"content_type": "text/csv"}),
        (gzip.compress(CSV), {"content_type": "text/csv", "content_encoding": "gzip"}),
    ],
)  # fmt: skip
def test_every_form_of_the_same_rows_is_the_same_version(
    service: PostTrainingService, content: bytes, headers: dict[str, str]
) -> None:
    answer = push(service, content=content, **headers)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["name"], found["rows"], found["bytes"]) == ("mine", len(ROWS), len(STORED))
    assert (found["sha256"], found["is_new"]) == (VERSION, True)
    assert found["columns"] == {"prompt": len(ROWS), "completion": len(ROWS)}
    assert (found["received_bytes"], found["received_sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    folder, rows = files(service)
    assert (rows, rows.read_bytes()) == (folder / ROWS_FILE, STORED)
    again = push(service).json()
    assert (again["sha256"], again["is_new"], again["created_at"]) == (VERSION, False, found["created_at"])
    assert files(service) == [folder, rows], "nothing is stored twice"


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (JSONL + b'{"prompt": \n' + JSONL, {},
         "dataset 'mine': 1 problem(s) in 25 row(s): row 13: line: is not JSON (Expecting value at character 12)"),
        (b"", {}, "rows: 'mine' is not valid; expected a file with rows; this one is empty"),
        (JSONL, {"content_encoding": "gzip"}, "rows: 'mine' is not valid; expected a gzip file; this one is damaged ("
         "Error -3 while decompressing data: incorrect header check)"),
        (gzip.compress(JSONL)[:-1], {},
         "rows: 'mine' is not valid; expected a whole gzip file; this one ends in the middle"),
        (JSONL, {"content_encoding": "br"}, "Content-Encoding: 'br' is not valid; expected gzip, or none"),
        (JSONL, {"content_type": "application/json"}, "Content-Type: 'application/json' is not valid; expected "
         "application/jsonl, application/x-ndjson or text/csv, each also gzipped, or application/gzip for gzipped JSON "
         "Lines"),
        (b"PAR1....", {}, "rows: 'mine' is not valid; expected JSON Lines or CSV; this is a Parquet file, which "
         "`moe-train data push` converts"),
        (CSV + b"a,b,c\n", {"content_type": "text/csv"}, "dataset 'mine': 1 problem(s) in 13 row(s): row 13: line 14: "
         "has 3 cells; the header has 2 columns"),
    ],
)  # fmt: skip
def test_a_refused_upload_leaves_nothing(
    service: PostTrainingService, content: bytes, headers: dict[str, str], message: str
) -> None:
    assert refusal(push(service, content=content, **headers)) == message
    assert files(service) == []
    assert ask(service, "GET", "/datasets").json()["data"] == []


def test_a_checksum_is_of_the_body_as_it_was_sent(service: PostTrainingService) -> None:
    zipped = gzip.compress(JSONL)
    wrong = hashlib.sha256(JSONL).hexdigest()
    message = refusal(push(service, content=zipped, query=f"?sha256={wrong}"))
    assert message == (
        f"sha256: '{wrong}' is not valid; expected the SHA-256 of the body, which is "
        f"{hashlib.sha256(zipped).hexdigest()}; it was changed or cut short on its way"
    )
    assert "64 hexadecimal digits" in refusal(push(service, content=zipped, query="?sha256=abc"))
    assert files(service) == []
    right = hashlib.sha256(zipped).hexdigest().upper()
    assert push(service, content=zipped, query=f"?sha256={right}").status_code == 200


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "9", "x" * 128])
def test_names(service: PostTrainingService, name: str) -> None:
    pushed(service, name)
    assert ask(service, "GET", f"/datasets/{name}").json()["name"] == name


@pytest.mark.parametrize("name", [".hidden", "-dash", "a@b", "a:b", "ä", "x" * 129, "a%0a", "a b", "data:x", "%00"])
def test_other_names_are_refused(service: PostTrainingService, name: str) -> None:
    for answer in (push(service, name), ask(service, "GET", f"/datasets/{name}"),
                   ask(service, "DELETE", f"/datasets/{name}")):  # fmt: skip
        assert refusal(answer).startswith("name: ")
        assert "expected 1 to 128 letters, digits, dots, dashes and underscores" in refusal(answer)
    assert files(service) == []


@pytest.mark.parametrize("path", ["..", "../jobs", "..%2fjobs", "%2e%2e", "a/../../b", "%2fetc%2fpasswd"])
def test_no_path_leads_out(service: PostTrainingService, path: str) -> None:
    assert get_raw(service, f"/datasets/{path}").status_code in (400, 404)


def test_versions(service: PostTrainingService) -> None:
    first, second = pushed(service), pushed(service, content=text("B"))
    assert first == VERSION != second

    def versions(**query: Any) -> list[str]:
        return [each["sha256"] for each in ask(service, "GET", "/datasets/mine", params=query).json()["versions"]]

    assert versions() == [second, first], "the current one first"
    assert pushed(service) == first
    assert versions() == [first, second], "what is pushed again is current again"
    assert versions(limit=1) == [first]
    (line,) = ask(service, "GET", "/datasets").json()["data"]
    assert (line["name"], line["sha256"], line["versions"]) == ("mine", first, 2)
    assert line["total_bytes"] == sum(path.stat().st_size for path in files(service) if path.is_file())
    gone = ask(service, "DELETE", f"/datasets/mine?version={first[:8]}").json()
    assert (gone["versions"], gone["bytes"]) == ([first], len(STORED))
    assert versions() == [second]
    assert len(files(service)) == 2
    assert ask(service, "DELETE", "/datasets/mine").json()["versions"] == [second]
    assert files(service) == []
    for method in ("GET", "DELETE"):
        assert refusal(ask(service, method, "/datasets/mine"), 404) == "you have no data set 'mine' on this server"


def test_a_version_is_named_by_its_first_digits(service: PostTrainingService) -> None:
    pushed(service)
    for version in ("abc", VERSION[:5], VERSION.upper(), "x" * 8, VERSION + "0", "%"):
        message = refusal(ask(service, "DELETE", "/datasets/mine", params={"version": version}))
        assert "expected 6 to 64 hexadecimal digits" in message
    answer = ask(service, "DELETE", "/datasets/mine", params={"version": "000000"})
    assert refusal(answer, 404) == "you have no version '000000' of a data set 'mine' on this server"
    assert len(files(service)) == 2


def test_lists_are_pages_by_name(service: PostTrainingService) -> None:
    for name in ("c", "a", "d", "b"):
        pushed(service, name, text(name))
    page = ask(service, "GET", "/datasets", params={"limit": 3}).json()
    assert ([each["name"] for each in page["data"]], page["has_more"]) == (["a", "b", "c"], True)
    page = ask(service, "GET", "/datasets", params={"limit": 3, "after": "c"}).json()
    assert ([each["name"] for each in page["data"]], page["has_more"]) == (["d"], False)
    assert page["used_bytes"] == sum(path.stat().st_size for path in files(service) if path.is_file())
    assert page["quota_bytes"] == QUOTA


def test_a_data_set_is_its_owners_alone(service: PostTrainingService) -> None:
    with caller("alice"):
        pushed(service)
        hers = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": "mine"}}).json()["job_uuid"]
    with caller("bob"):
        for answer in (ask(service, "GET", "/datasets/mine"), ask(service, "DELETE", "/datasets/mine")):
            assert refusal(answer, 404) == "you have no data set 'mine' on this server"
        assert ask(service, "GET", "/datasets").json()["data"] == []
        for dataset_id in ("mine", "data:mine", f"mine@{VERSION}"):
            answer = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": dataset_id}})
            assert answer.status_code == 404
        his = pushed(service, content=text("bob's"))
        answer = ask(service, "POST", "/jobs/validate", json=BODY | {"data": {"dataset_id": "mine"},
                                                                   "options": {"validation_split": 0}})  # fmt: skip
        assert answer.json()["sources"]["train"]["version"] == his
    with caller("root", roles=["admin"]):
        assert ask(service, "GET", "/datasets/mine").status_code == 404
    with caller("alice"):
        assert [each["sha256"] for each in ask(service, "GET", "/datasets/mine").json()["versions"]] == [VERSION]
        assert ask(service, "DELETE", "/datasets/mine").status_code == 200
        assert folder_of(service, hers).train_rows.is_file()
    with caller("bob"):
        assert ask(service, "GET", "/datasets/mine").json()["versions"][0]["sha256"] == his


def test_limits(service: PostTrainingService) -> None:
    fits = text("", LARGEST - 40)
    assert len(fits) < LARGEST
    pushed(service, content=fits)
    for content in (text("", LARGEST), gzip.compress(text("", LARGEST))):
        message = refusal(push(service, "large", content), 413)
        assert message == "large: more than 100,000 bytes (`max_dataset_bytes` of this server)"
    bomb = gzip.compress(b" " * 60_000 + b"\n" + b" " * 60_000)
    assert refusal(push(service, "large", bomb), 413) == message
    rows = b'{"a":1}\n' * (MAX_ROWS + 1)
    assert refusal(push(service, "long", rows), 413) == "long: more than 1,000 rows (`max_rows` of this server)"
    assert len(files(service)) == 2


def test_a_quota_counts_all_versions_of_all_data_sets_of_an_owner(service: PostTrainingService) -> None:
    with caller("alice"):
        first = pushed(service, "one", text("1", 90_000))
        pushed(service, "two", text("2", 90_000))
        used = ask(service, "GET", "/datasets").json()["used_bytes"]
        message = refusal(push(service, "three", text("3", 30_000)), 413)
        left = QUOTA - used
        assert message == (
            f"three: at least {left + 1:,} bytes, but of your 200,000 bytes on this server (`dataset_quota_bytes`) "
            f"{used:,} are used; delete data sets or versions (moe-train data rm NAME)"
        )
        message = refusal(push(service, "one", text("another", 80_000)), 413)
        assert message.startswith("one: at least 80,0"), "a further version counts too"
        assert pushed(service, "one", text("1", 90_000)) == first, "what is there already needs no room"
        pushed(service, "small", text("4"))
        assert len([path for path in files(service) if path.is_file()]) == 3
    with caller("bob"):
        pushed(service, "one", text("1", 90_000))
    with caller("alice"):
        ask(service, "DELETE", "/datasets/two")
        pushed(service, "three", text("3", 30_000))


def test_a_full_disk_refuses_uploads(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    message = refusal(push(service), 507)
    assert "the disk is full" in message
    assert "the data set was not stored" in message
    assert files(service) == []


def test_a_store_that_fails_leaves_nothing(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OperationalError("INSERT", {}, Exception("disk I/O error"))

    monkeypatch.setattr(service.store.datasets, "add", fails)
    assert push(service).status_code == 503
    assert files(service) == []


def test_files_are_private(service: PostTrainingService) -> None:
    pushed(service)
    for path in [service.config.datasets_dir, service.config.datasets_dir / "incoming", *files(service)]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_what_a_dead_server_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        pushed(service)
        kept = files(service)
        root = service.config.datasets_dir
        shutil.copytree(kept[0], root / ("0" * 32))  # renamed, but the store never heard of it
        (root / "incoming" / "half").write_bytes(JSONL[:100])
    with serving_in_process(tmp_path) as service:
        assert files(service) == kept
        assert ask(service, "GET", "/datasets/mine").json()["versions"][0]["sha256"] == VERSION


def test_the_routes_are_documented(service: PostTrainingService) -> None:
    paths = app_of(service).openapi()["paths"]
    put = paths[f"{PREFIX}/datasets/{{name}}"]["put"]
    assert set(put["requestBody"]["content"]) == {
        "application/jsonl", "application/x-ndjson", "text/csv", "application/gzip",
    }  # fmt: skip
    assert put["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/PushedDataset")
    assert {"400", "413", "503", "507"} <= set(put["responses"])
    must_be_documented(service, push(service))
