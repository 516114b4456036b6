"""Tests a job's output as server-sent events: no line twice, no line missed, no task left behind."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llama_stack_provider_moe.control.server import event_texts, stream
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.server.views import LOG_WINDOW_BYTES
from llama_stack_provider_moe.jobdir.events import EventLog, Message, Step
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import app_of, ask, caller, folder_of, scope_of, serving_in_process, submit


class Sent(NamedTuple):
    """One server-sent event."""

    name: str
    number: int | None
    data: Any


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("stream")) as made:
        yield made


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "POLL_S", 0.005)


def parsed(body: str) -> list[Sent]:
    """The events of a whole body, without comments."""
    found = []
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            number = fields.get("id")
            name = fields.get("event", "message")
            found.append(Sent(name, None if number is None else int(number), json.loads(fields["data"])))
    return found


def lines(events: list[Sent]) -> list[str]:
    return [line for event in events if event.name == "message" for line in event.data["log_lines"]]


def followed(service: PostTrainingService, job_id: str, headers: dict[str, str] | None = None, **query: Any) -> Any:
    """Every event of a job that has ended."""
    answer = ask(service, "GET", f"/jobs/{job_id}/logs", params={"follow": True, **query}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    return parsed(answer.text)


def an_ended_job(service: PostTrainingService, text: str) -> str:
    job_id = submit(service)
    folder_of(service, job_id).output.write_text(text)
    service.store.move(job_id, JobState.FAILED, reason="it ended")
    return job_id


def test_the_output_of_an_ended_job_and_its_end(service: PostTrainingService) -> None:
    text = "one\ntwo\n\x1b[31mred\x1b[0m \u2028half\nlast words"
    job_id = an_ended_job(service, text)
    *pieces, end = followed(service, job_id)
    assert lines(pieces) == ["one", "two", "red \ufffdhalf", "last words"]
    assert pieces[-1].number == pieces[-1].data["next_offset"] == len(text.encode())
    assert end == Sent("end", None, {"job_uuid": job_id, "status": "failed"})
    assert lines(followed(service, job_id, tail=2)) == ["red \ufffdhalf", "last words"]
    assert lines(followed(service, job_id, offset=4))[0] == "two"


def test_a_reader_continues_where_it_stopped(service: PostTrainingService) -> None:
    job_id = an_ended_job(service, "one\ntwo\nthree\n")
    again = followed(service, job_id, headers={"Last-Event-ID": "8"}, offset=0)
    assert (lines(again), again[-1].name) == (["three"], "end"), "the header takes precedence over the parameter"
    [end] = followed(service, job_id, headers={"Last-Event-ID": "14"})
    assert end.name == "end"


def test_long_output_comes_in_pieces(service: PostTrainingService) -> None:
    text = ("x" * 99 + "\n") * (3 * LOG_WINDOW_BYTES // 100)
    events = followed(service, an_ended_job(service, text), offset=0)
    assert "".join(line + "\n" for line in lines(events)) == text
    assert max(len(json.dumps(event.data)) for event in events) < 2 * LOG_WINDOW_BYTES


def test_a_job_is_followed_while_it_runs(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.02)
    job_id = submit(service)
    output = folder_of(service, job_id).output

    async def follow() -> tuple[list[str], list[Sent]]:
        chunks = await service.follow(job_id, 200, None)
        seen: list[str] = []
        comments = 0
        async for chunk in chunks:
            seen.append(chunk.decode())
            comments += chunk.startswith(b":")
            if comments == 3 and not output.exists():  # it waits, and says so
                output.write_text("begins\nhalf a li")
            elif lines(parsed("".join(seen))) == ["begins"]:
                output.write_text("begins\nhalf a line\nmore\nlast words")
                service.store.move(job_id, JobState.FAILED, reason="it ended")
        return seen, parsed("".join(seen))

    seen, events = asyncio.run(asyncio.wait_for(follow(), 60))
    assert lines(events) == ["begins", "half a line", "more", "last words"]
    assert events[-1].name == "end"
    assert seen[0].startswith(":"), "the stream starts with a comment at once"


def test_a_job_that_is_deleted_meanwhile_says_so(service: PostTrainingService) -> None:
    def gone(_: int | None) -> stream.OutputPage:
        service.store.get("deleted", None)
        raise AssertionError

    followers = stream.Followers(asyncio.to_thread, service.guard.failures)
    [event] = parsed(b"".join(asyncio.run(_all(followers.output(gone, None)))).decode())
    assert (event.name, event.data) == ("error", {"error": {"message": "job 'deleted' does not exist"}})


async def _all(chunks: AsyncIterator[bytes]) -> list[bytes]:
    return [chunk async for chunk in chunks]


def test_a_stream_does_not_delay_shutdown(service: PostTrainingService) -> None:
    class Uvicorn:
        should_exit = False

        def handle_exit(self, *_: object) -> None:
            self.should_exit = True

    server, before = Uvicorn(), signal.getsignal(signal.SIGTERM)
    job_id = submit(service)

    async def follow() -> list[bytes]:
        chunks = await service.follow(job_id, 200, None)
        asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGTERM)
        return await _all(chunks)

    signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        sent = asyncio.run(asyncio.wait_for(follow(), 60))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert server.should_exit
    assert parsed(b"".join(sent).decode()) == [], "without `end` the job continues"


def test_a_reader_that_goes_away_leaves_nothing(service: PostTrainingService) -> None:
    job_id = submit(service)

    async def visit() -> int:
        heard, wrote = asyncio.Event(), []

        async def receive() -> dict[str, Any]:
            if not wrote:
                await heard.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            wrote.append(message)
            heard.set()

        scope = scope_of(f"{PREFIX}/jobs/{job_id}/logs".encode(), b"follow=true")
        app: Callable[..., Any] = app_of(service)
        await asyncio.wait_for(app(scope, receive, send), 60)
        return len(asyncio.all_tasks())

    assert asyncio.run(visit()) == 1, "no other task is left"


@pytest.mark.parametrize("number", ["x", "-1", str(2**63)])
def test_an_invalid_event_id_is_refused(service: PostTrainingService, number: str) -> None:
    job_id = submit(service)
    answer = ask(service, "GET", f"/jobs/{job_id}/logs?follow=true", headers={"Last-Event-ID": number})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"last-event-id: {number!r} is not valid; expected ")


def test_other_users_get_no_output(service: PostTrainingService) -> None:
    job_id = submit(service)
    with caller("mallory"):
        answer = ask(service, "GET", f"/jobs/{job_id}/logs?follow=true")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")


def test_a_stream_keeps_its_caller_to_the_end(service: PostTrainingService) -> None:
    """The host forgets the caller when the request's handler returns, before the stream is read."""
    with caller("alice"):
        job_id = submit(service)
        chunks = asyncio.run(service.follow(job_id, 200, None))
    folder_of(service, job_id).output.write_text("hers\n")
    service.store.move(job_id, JobState.FAILED, reason="it ended")
    assert lines(parsed(b"".join(asyncio.run(_all(chunks))).decode())) == ["hers"]


def test_the_document_describes_both_answers(service: PostTrainingService, tmp_path: Path) -> None:
    documented = app_of(service).openapi()["paths"][f"{PREFIX}/jobs/{{job_uuid}}/logs"]["get"]["responses"]["200"]
    assert set(documented["content"]) == {"application/json", "text/event-stream"}


def test_events_are_followed_to_the_end_in_pieces(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_texts, "STREAMED_EVENTS", 3)
    job_id = submit(service)
    path = folder_of(service, job_id).events
    log = EventLog(path)
    for step in range(1, 11):
        log.append(Step(step=step, max_steps=10, epoch=1, metrics={"loss": 1.0}))
        log.append(Message(text=f"after step {step}"))
    log.close()
    asyncio.run(service.cancel(job_id))
    query = {"follow": True, "types": "step"}
    answer = ask(service, "GET", f"/jobs/{job_id}/events", params=query)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parsed(answer.text)
    steps = [event["step"] for sent in events[:-1] for event in sent.data["events"]]
    assert steps == list(range(1, 11))
    assert max(len(sent.data["events"]) for sent in events[:-1]) == 3
    assert (events[-1].name, events[-1].data) == ("end", {"job_uuid": job_id, "status": "cancelled"})
    again = ask(
        service, "GET", f"/jobs/{job_id}/events", params=query, headers={"Last-Event-ID": str(events[1].number)}
    )
    rest = [event["step"] for sent in parsed(again.text)[:-1] for event in sent.data["events"]]
    assert rest == steps[6:]
