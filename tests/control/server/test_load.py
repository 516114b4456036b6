"""Tests that no request blocks the others, whatever its content and whatever goes wrong with it."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server import bodies, guard, resolve, stream
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import BODY, app_of, ask, over_http, serving_in_process, submit
from tests.support.jobs_support import wait_for

SLOW_S = 5.0  # far more than the event loop ever blocks here, far less than it did before the fix
# Processor time of this process: on a busy machine every pause is longer, whatever the server does.
clock = time.process_time


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def longest_pause_s(service: PostTrainingService, path: str, body: bytes) -> tuple[httpx.Response, float]:
    """The answer to a body, and for how much processor time the event loop was blocked at most."""

    async def both() -> tuple[httpx.Response, float]:
        transport = httpx.ASGITransport(app=app_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test" + PREFIX) as client:
            asked = asyncio.ensure_future(
                client.post(path, content=body, headers={"Content-Type": "application/json"}, timeout=None)
            )
            longest = 0.0
            while not asked.done():
                before = clock()
                await asyncio.sleep(0.01)
                longest = max(longest, clock() - before)
            return asked.result(), longest

    return asyncio.run(both())


def unknown_keys(count: int, start: dict[str, Any] | None = None) -> bytes:
    return json.dumps({**(start or {}), **{f"unknown_{number:05d}": number for number in range(count)}}).encode()


@pytest.mark.parametrize(
    "path", ["/jobs", "/jobs/validate", "/supervised-fine-tune", "/preference-optimize", "/job/cancel"]
)
def test_unknown_keys_do_not_block_the_event_loop(service: PostTrainingService, path: str) -> None:
    answer, pause_s = longest_pause_s(
        service, path, unknown_keys(45_000, {"recipe": "sft"} if path == "/jobs" else None)
    )
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert len(answer.text) < 20_000
    assert "more" in answer.json()["error"]["message"][-20:] or path == "/jobs/validate"
    assert pause_s < SLOW_S


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (unknown_keys(60_000), "the body has more than 50,000 values; rows of a job belong in a data set"),
        (b"[" * 100_000 + b"]" * 100_000, "the body is nested more than 64 levels deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "the body is nested more than 64 levels deep"),
        (b'{"recipe": ' + b"9" * 5000 + b"}", "the body can't be read (Exceeds the limit"),
        (b'{"recipe": "\xff"}', "the body can't be read ("),
        (b"[" * 4_000_000, "the body has more than 50,000 values"),
    ],
    ids=["many", "deep", "a little too deep", "a long number", "not UTF-8", "lists without end"],
)
def test_limits_of_a_body(service: PostTrainingService, body: bytes, told: str) -> None:
    answer, pause_s = longest_pause_s(service, "/jobs", body)
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert answer.json()["error"]["message"].startswith(told)
    assert pause_s < SLOW_S


def test_a_long_key_is_cut(service: PostTrainingService) -> None:
    answer, pause_s = longest_pause_s(service, "/jobs", json.dumps(BODY | {"k" * 1_000_000: 1}).encode())
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert len(answer.text) < 1000
    assert pause_s < SLOW_S


def test_a_small_body_does_not_wait_for_large_ones() -> None:
    both, held = bodies.Bodies(), threading.Event()

    async def act() -> str:
        large = asyncio.ensure_future(both.run(bodies.LARGE_BYTES + 1, held.wait))
        found = await asyncio.wait_for(both.run(10, lambda: "small"), 60)
        held.set()
        await large
        return found

    assert asyncio.run(act()) == "small"
    both.close()


def test_an_unexpected_error_is_logged_briefly(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = []

    def fails(*_: Any) -> None:
        threads.append(threading.current_thread())
        raise LookupError("x" * 100_000)

    monkeypatch.setattr(service.store, "get", fails)
    with caplog.at_level(logging.ERROR):
        for _ in range(30):
            answer = ask(service, "GET", "/jobs/some")
            assert answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
            assert answer.json() == {
                "error": {"message": "the server failed on an unexpected error; see the server's log"}
            }
        service.guard.failures.close(60)
    told = [record for record in caplog.records if "GET" in record.getMessage()]
    assert len(told) == 30
    assert all(record.exc_info is None for record in told), "a host's logger would render it for seconds"
    assert {record.threadName for record in told} == {"moe-failures"}
    assert "Traceback" in told[0].getMessage()
    assert "in fails" in told[0].getMessage()
    assert all("Traceback" not in record.getMessage() for record in told[1:])
    assert all(len(record.getMessage()) < 10_000 for record in told)


def test_a_job_needs_no_thread_of_the_hosts_pool(service: PostTrainingService) -> None:
    """Other providers share that pool, and may have filled it with calls that never return."""
    goes_on = threading.Event()

    async def act() -> str:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        held = loop.run_in_executor(None, goes_on.wait)
        try:
            return (await asyncio.wait_for(service.submit(BODY), 60)).job_uuid
        finally:
            goes_on.set()
            await held

    assert service.store.get(asyncio.run(act()), None).state is JobState.SCHEDULED


async def _all(chunks: Any) -> list[str]:
    return [chunk.decode() async for chunk in chunks]


def test_an_error_in_a_stream_is_an_event(service: PostTrainingService, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: int | None) -> stream.OutputPage:
        raise ZeroDivisionError

    followers = stream.Followers(asyncio.to_thread, service.guard.failures)
    with caplog.at_level(logging.ERROR):
        sent = asyncio.run(_all(followers.output(fails, None)))
        service.guard.failures.close(60)
    assert sent[-1].startswith("event: error\n")
    assert any("ZeroDivisionError" in record.getMessage() for record in caplog.records)


def test_many_followers_poll_less_often(service: PostTrainingService) -> None:
    followers = stream.Followers(asyncio.to_thread, service.guard.failures)
    assert followers._poll_s == stream.POLL_S
    followers._count = 200
    assert 200 / followers._poll_s == stream.LOOKS_A_SECOND


def test_a_file_that_disappears_ends_only_its_own_answer(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from llama_stack_provider_moe.control.server import files

    waits = submit(service)
    path = tmp_path / "gone"
    path.write_text("x")
    found = files.File(path, path.stat(), "0" * 64)
    path.unlink()

    async def artifact_file(*_: Any) -> files.File:
        return found

    monkeypatch.setattr(service, "artifact_file", artifact_file)
    with caplog.at_level(logging.ERROR):
        with over_http(service) as url, pytest.raises(httpx.RemoteProtocolError):  # the connection is closed
            httpx.get(f"{url}{PREFIX}/jobs/{waits}/artifacts/adapter/gone", timeout=60)
        service.guard.failures.close(60)
    assert any("the answer to" in record.getMessage() for record in caplog.records)


def test_a_folder_that_does_not_answer(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a dead network mount."""
    waits = submit(service)
    comes_back = threading.Event()
    real: Callable[..., Any] = resolve.resolve_names

    def hangs(*arguments: Any) -> Any:
        comes_back.wait()
        return real(*arguments)

    monkeypatch.setattr(resolve, "resolve_names", hangs)
    monkeypatch.setattr(guard, "PLACES_LIMIT_S", 0.2)
    service.guard._places._stuck_s = 0.2
    for number in range(6):
        answer = ask(service, "POST", "/jobs", json=BODY | {"job_uuid": f"new-{number}"})
        assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        told = answer.json()["error"]["message"]
        assert told == ("model 'owner/name': no answer within 0.2 seconds; try again" if number < 4 else
                        "the server is too busy with folders that jobs name; try again")  # fmt: skip
        assert ask(service, "GET", f"/jobs/{waits}").json()["status"] == JobState.SCHEDULED
    comes_back.set()
    monkeypatch.setattr(resolve, "resolve_names", real)
    monkeypatch.setattr(guard, "PLACES_LIMIT_S", 60.0)
    wait_for(lambda: ask(service, "POST", "/jobs", json=BODY).status_code == HTTPStatus.OK)
    with pytest.raises(NotFound):
        service.store.get("new-0", None)
