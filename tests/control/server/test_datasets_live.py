"""Uploads over real connections: cut, slow, at the same time, killed; the server's memory and its other answers."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from llama_stack_provider_moe.control.server import own_datasets, uploads
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.control.server.test_datasets import JSONL, VERSION, files, pushed, text
from tests.support.host_harness import QUICKSTART, run_config, serving
from tests.support.host_support import BODY, ask, folder_of, over_http, serving_in_process
from tests.support.jobs_support import wait_for

LIMIT_S = 120.0
MIB = 1 << 20


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def rows_of(size_bytes: int, tail: bytes = b"") -> Iterator[bytes]:
    """A file of rows of 2 KB, in pieces."""
    row = text("x" * 1960) + b"\n"
    piece = row * (64 * 1024 // len(row))
    for _ in range(size_bytes // len(piece)):
        yield piece
    yield tail


def an_open_upload(url: str, sent: bytes, length: int | None = 10 * MIB) -> socket.socket:
    """A connection that has sent the beginning of an upload; `length` None: in chunks of unknown number."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=LIMIT_S)
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    body = sent if length is not None else b"%x\r\n%s\r\n" % (len(sent), sent)
    head = f"PUT {PREFIX}/datasets/mine HTTP/1.1\r\nHost: {parts.netloc}\r\n{size}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("length", [10 * MIB, None])
def test_a_connection_that_is_cut_leaves_nothing(service: PostTrainingService, length: int | None) -> None:
    with over_http(service) as url:
        with an_open_upload(url, JSONL * 1000, length):
            wait_for(lambda: bool(files(service)))
        wait_for(lambda: not files(service))
        assert httpx.get(url + PREFIX + "/datasets", timeout=LIMIT_S).json()["data"] == []


def test_a_client_that_stops_sending_is_refused(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SILENCE_S", 0.2)
    with over_http(service) as url, an_open_upload(url, JSONL) as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 400
        assert b"expected a body that goes on" in answer.read()
    assert files(service) == []


def test_a_server_that_stops_does_not_wait_for_an_upload(service: PostTrainingService) -> None:
    with over_http(service) as url:
        connection = an_open_upload(url, JSONL * 1000)
        wait_for(lambda: bool(files(service)))
        began = time.monotonic()
    assert time.monotonic() - began < uploads.SILENCE_S / 2
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 503
    assert b"the server is shutting down" in answer.read()
    connection.close()
    assert files(service) == []


@pytest.mark.parametrize("limit", ["MAX_UPLOADS", "MAX_OF_OWNER"])
def test_too_many_uploads_at_a_time(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(uploads, limit, 1)
    with over_http(service) as url:
        with an_open_upload(url, JSONL * 1000):
            wait_for(lambda: bool(files(service)))
            answer = httpx.put(url + PREFIX + "/datasets/other", content=JSONL, timeout=LIMIT_S)
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        wait_for(lambda: httpx.put(url + PREFIX + "/datasets/other", content=JSONL, timeout=LIMIT_S).status_code == 200)


def test_a_client_hears_of_a_bad_row_and_can_continue(service: PostTrainingService) -> None:
    with over_http(service) as url, httpx.Client(base_url=url + PREFIX, timeout=LIMIT_S) as client:
        answer = client.put("/datasets/mine", content=rows_of(2 * MIB, b"not JSON\n" + JSONL))
        assert answer.status_code == 400
        assert "is not JSON (Expecting value at character 1)" in answer.text
        answer = client.put("/datasets/mine", content=(b"[]\n" * 1000 for _ in range(1000)))
        assert answer.status_code == 400
        assert files(service) == []
        assert client.put("/datasets/mine", content=rows_of(2 * MIB)).status_code == 200


def test_many_pushes_of_one_name_at_once(service: PostTrainingService) -> None:
    contents = [text(f"content {number % 4}") + b"\n" + JSONL * 200 for number in range(12)]
    with over_http(service) as url, ThreadPoolExecutor(len(contents)) as clients:

        def send(content: bytes) -> httpx.Response:
            return httpx.put(url + PREFIX + "/datasets/mine", content=content, timeout=LIMIT_S)

        answers = list(clients.map(send, contents))
        assert {answer.status_code for answer in answers} == {200}
        versions = httpx.get(url + PREFIX + "/datasets/mine", timeout=LIMIT_S).json()["versions"]
    assert sorted(each["sha256"] for each in versions) == sorted({answer.json()["sha256"] for answer in answers})
    assert sum(answer.json()["is_new"] for answer in answers) == len(versions) == 4
    assert len([path for path in files(service) if path.is_file()]) == 4


def test_a_job_that_reads_is_not_disturbed(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(service, content=JSONL * 200)
    reading, may_go_on = threading.Event(), threading.Event()
    page = own_datasets._page

    def slowly(file: BinaryIO, rows: int) -> list[object]:
        found = page(file, rows)
        reading.set()
        assert may_go_on.wait(LIMIT_S)
        return found

    monkeypatch.setattr(own_datasets, "_page", slowly)
    with over_http(service) as url, ThreadPoolExecutor(1) as other:
        body = BODY | {"data": {"dataset_id": "mine"}}
        submitted = other.submit(httpx.post, url + PREFIX + "/jobs", json=body, timeout=LIMIT_S)
        assert reading.wait(LIMIT_S)
        assert httpx.put(url + PREFIX + "/datasets/mine", content=JSONL, timeout=LIMIT_S).json()["sha256"] == VERSION
        assert len(httpx.delete(url + PREFIX + "/datasets/mine", timeout=LIMIT_S).json()["versions"]) == 2
        may_go_on.set()
        job = submitted.result().json()["job_uuid"]
    assert len(folder_of(service, job).train_rows.read_bytes().splitlines()) == 200 * 12
    assert ask(service, "GET", f"/jobs/{job}").json()["sources"]["train"]["rows"] == 200 * 12
    assert files(service) == []


def test_the_server_answers_others_during_an_upload(service: PostTrainingService) -> None:
    """Were it blocked, one answer would take most of the time that the upload takes."""
    slowest_s, requests = 0.0, 0
    with (
        over_http(service) as url,
        ThreadPoolExecutor(1) as other,
        httpx.Client(base_url=url + PREFIX, timeout=LIMIT_S) as client,
    ):
        client.get("/datasets")
        content = b"".join(rows_of(40 * MIB))
        sent = other.submit(httpx.put, url + PREFIX + "/datasets/mine", content=content, timeout=LIMIT_S)
        start = time.monotonic()
        while not sent.done():
            began = time.monotonic()
            assert client.get("/datasets").status_code == 200
            slowest_s, requests = max(slowest_s, time.monotonic() - began), requests + 1
        took_s = time.monotonic() - start
        assert sent.result().status_code == 200
    assert requests > 10
    assert slowest_s < took_s / 2


@pytest.mark.e2e
def test_the_servers_memory_stays_and_a_killed_server_leaves_nothing(tmp_path: Path) -> None:
    config = run_config(QUICKSTART, tmp_path, {"supervisor": {"start": False}})
    state, upload = tmp_path / "state", "/datasets/mine"

    def arriving() -> list[Path]:
        return list((state / "datasets" / "incoming").iterdir())

    with serving(config, state) as server, server.http(LIMIT_S) as client:
        process = psutil.Process(server.process.pid)
        assert client.put(upload, content=rows_of(MIB)).status_code == 200
        before = process.memory_info().rss
        answer = client.put(upload, content=rows_of(50 * MIB))
        assert answer.status_code == 200
        assert answer.json()["bytes"] > 48 * MIB
        assert process.memory_info().rss - before < 24 * MIB
        with an_open_upload(server.url, b"".join(rows_of(5 * MIB)), 50 * MIB):
            wait_for(lambda: any(path.stat().st_size > MIB for path in arriving()))
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
    assert len(arriving()) == 1
    with serving(config, state) as server, server.http(LIMIT_S) as client:
        assert arriving() == []
        (line,) = client.get("/datasets").json()["data"]
        assert (line["name"], line["versions"]) == ("mine", 2)
        assert len(list((state / "datasets").glob("*/rows.jsonl"))) == 2


def test_another_servers_start_leaves_a_running_upload_alone(service: PostTrainingService, tmp_path: Path) -> None:
    with over_http(service) as url, an_open_upload(url, JSONL * 1000, len(JSONL) * 2000) as connection:
        wait_for(lambda: bool(files(service)))
        with serving_in_process(tmp_path):
            assert len(files(service)) == 1
        connection.sendall(JSONL * 1000)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert json.loads(answer.read())["rows"] == 24_000
