"""Tests of requests while the store is lost, hangs, or its disk is full: each is answered soon, and says so."""

import asyncio
import errno
import gc
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.control.server import guard, store_watch, stream
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import SupervisorConfig
from tests.support.host_support import BODY, ask, serving_in_process, submit
from tests.support.jobs_support import fill, small_disk, wait_for

WRITES = [
    ("POST", "/jobs", BODY),
    ("POST", "/jobs/{cancelled}/resume", None),
    ("POST", "/jobs/{waits}/cancel", None),
    ("DELETE", "/jobs/{cancelled}", None),
    ("POST", "/job/cancel", {"job_uuid": "{waits}"}),
]
READS = [
    ("GET", "/jobs", None),
    ("GET", "/jobs/{waits}", None),
    ("GET", "/jobs/{waits}/status", None),
    ("GET", "/jobs/{waits}/artifacts", None),
    ("GET", "/jobs/{waits}/artifacts/adapter", None),
    ("GET", "/jobs/{waits}/artifacts/adapter/x", None),
    ("GET", "/jobs/{waits}/exports", None),
    ("POST", "/jobs/{waits}/exports", {"merged": True}),
    ("GET", "/jobs/{waits}/logs", None),
    ("GET", "/jobs/{waits}/logs?follow=true", None),
    ("GET", "/jobs/{waits}/events", None),
    ("GET", "/jobs/{waits}/metrics", None),
    ("POST", "/jobs/validate", BODY | {"job_uuid": "new"}),
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def lost(*_: Any, **__: Any) -> None:
    raise OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly"))


@pytest.fixture
def names(service: PostTrainingService) -> dict[str, str]:
    ended = submit(service)
    service.store.request_cancel(ended, None)
    return {"waits": submit(service), "cancelled": ended}


def asked(service: PostTrainingService, method: str, path: str, body: Any, names: dict[str, str]) -> httpx.Response:
    if body is not None:
        body = json.loads(json.dumps(body).replace("{waits}", names["waits"]))
    return ask(service, method, path.format(**names), json=body)


@pytest.mark.parametrize(("method", "path", "body"), [*WRITES, *READS], ids=lambda value: str(value)[:40])
def test_a_lost_store_is_503_on_every_route(
    service: PostTrainingService,
    names: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    body: Any,
) -> None:
    for name in ("get", "list", "request_cancel", "resume", "delete", "exports", "check", "job_counts"):
        monkeypatch.setattr(service.store, name, lost)
    monkeypatch.setattr(service.store, "answers", lambda: False)
    answer = asked(service, method, path, body, names)
    assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    assert "store does not answer" in answer.json()["error"]["message"]


def test_a_store_lost_after_it_accepted_a_job_does_not_change_the_answer(
    service: PostTrainingService, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a 503 the client sends the job again, and it would run twice."""
    starts = {"start": True, **service.config.supervisor.model_dump(exclude={"start"})}
    service._keeper._config = service.config.model_copy(update={"supervisor": SupervisorConfig(**starts)})
    monkeypatch.setattr(service.store, "live_supervisor", lost)
    assert ask(service, "POST", "/jobs", json=BODY | {"job_uuid": "taken"}).status_code == HTTPStatus.OK
    assert service.store.get("taken", None).state is JobState.SCHEDULED
    assert ask(service, "POST", f"/jobs/{names['cancelled']}/resume").status_code == HTTPStatus.OK
    service.store.move("taken", JobState.IN_PROGRESS)
    assert ask(service, "POST", "/jobs/taken/cancel").status_code == HTTPStatus.OK
    assert service.store.get("taken", None).cancel_requested_at is not None


def test_health_of_a_store_that_is_lost_between_two_queries(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store, "counts", lost)
    answer = ask(service, "GET", "/health")
    assert (answer.status_code, answer.json()["store"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "unreachable")


def test_a_failed_probe_is_logged_once_and_not_on_the_event_loop(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Any:
        raise LookupError("no such thing")

    monkeypatch.setattr(service.store, "answers", fails)
    with caplog.at_level(logging.ERROR):
        assert ask(service, "GET", "/health").status_code == HTTPStatus.INTERNAL_SERVER_ERROR
        service.guard.failures.close(60)
        gc.collect()
    assert [record.threadName for record in caplog.records] == ["moe-failures"]


def test_a_store_that_hangs_is_503_and_then_at_once(
    service: PostTrainingService, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates a stopped database: calls neither return nor fail."""
    goes_on = threading.Event()
    real, real_get = service.store.answers, service.store.get

    def held_answers() -> bool:
        goes_on.wait()
        return real()

    def held_get(*arguments: Any) -> Any:
        goes_on.wait()
        return real_get(*arguments)

    assert ask(service, "GET", "/health").status_code == HTTPStatus.OK
    monkeypatch.setattr(service.store, "answers", held_answers)
    monkeypatch.setattr(service.store, "get", held_get)
    monkeypatch.setattr(guard, "HEALTH_KEPT_S", 0.0)
    began = time.monotonic()
    assert ask(service, "GET", "/health").status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert time.monotonic() - began < 60, "the store's call itself never ends"
    begun = ask(service, "POST", f"/jobs/{names['cancelled']}/resume")  # its thread waits, and will resume the job
    assert begun.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert "may still take effect, so check before you repeat it" in begun.json()["error"]["message"]
    monkeypatch.setattr(store_watch, "ANSWER_S", 1000.0)  # a request that waits now would wait forever
    for _ in range(3 * store_watch.THREADS):
        service.guard._watch._record(False)
        assert ask(service, "GET", f"/jobs/{names['waits']}").status_code == HTTPStatus.SERVICE_UNAVAILABLE
    goes_on.set()
    wait_for(lambda: ask(service, "GET", f"/jobs/{names['waits']}").status_code == HTTPStatus.OK)
    wait_for(lambda: real_get(names["cancelled"], None).state is JobState.SCHEDULED)
    assert ask(service, "GET", "/health").status_code == HTTPStatus.OK


@pytest.mark.parametrize("words", ["(sqlite3) database or disk is full", errno.ENOSPC, errno.EDQUOT], ids=str)
@pytest.mark.parametrize(("method", "path", "body"), WRITES, ids=lambda value: str(value)[:40])
def test_a_full_disk_is_507_on_every_route_that_writes(
    service: PostTrainingService, names: dict[str, str], monkeypatch: pytest.MonkeyPatch, method: str, path: str,
    body: Any, words: str | int,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        if isinstance(words, str):
            raise OperationalError("INSERT", {}, Exception(words))
        raise OSError(words, os.strerror(words))

    for name in ("add", "request_cancel", "resume", "delete"):
        monkeypatch.setattr(service.store, name, full)
    if path.endswith("resume"):
        monkeypatch.setattr("llama_stack_provider_moe.control.server.job_changes.must_be_resumable", lambda *_: None)
    answer = asked(service, method, path, body, names)
    assert answer.status_code == HTTPStatus.INSUFFICIENT_STORAGE, answer.text
    assert answer.json()["error"]["message"].startswith("the disk is full")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with small_disk(small), serving_in_process(small) as service:
        waits = submit(service)
        ended = submit(service)
        service.store.request_cancel(ended, None)
        ballast = fill(small)
        for method, path in (("POST", f"/jobs/{waits}/cancel"), ("DELETE", f"/jobs/{ended}")):
            answer = ask(service, method, path)
            assert answer.status_code in (200, 507), answer.text  # the store's log may have a free page
        assert ask(service, "GET", "/jobs").status_code == 200
        ballast.unlink()
        service.store.close()


async def _chunks(chunks: Any) -> list[str]:
    return [chunk.decode() async for chunk in chunks]


def test_followers_wait_until_the_store_returns(
    service: PostTrainingService, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "POLL_S", 0.01)
    monkeypatch.setattr(stream, "LOST_POLL_S", 0.01)
    real, calls = service.store.get, []

    def comes_back(*arguments: Any) -> Any:
        calls.append(1)
        if 1 < len(calls) < 4:
            lost()
        return real(*arguments)

    async def follow() -> list[str]:
        monkeypatch.setattr(service.store, "get", comes_back)
        return await _chunks(await service.follow(names["cancelled"], 10, None))

    sent = asyncio.run(asyncio.wait_for(follow(), 120))
    assert ": waiting for the server's store\n\n" in sent
    assert sent[-1].startswith("event: end\n")
