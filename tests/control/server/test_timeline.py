"""Tests a job's events as pages and its metrics as series, read from the file of the training process."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server import timeline
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import Evaluation, EventLog, Message, Routing, Started, Step
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting
from tests.support.host_support import ask, folder_of, serving_in_process, submit


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("timeline")) as made:
        submit(made, job_uuid="j")
        yield made


@pytest.fixture
def job(service: PostTrainingService) -> str:
    """A job without events."""
    folder_of(service, "j").events.unlink(missing_ok=True)
    return "j"


def a_step(number: int, **metrics: float) -> Step:
    return Step(step=number, max_steps=100, epoch=number / 10, metrics=metrics or {"loss": 1.0 / number})


def resumed(path: Path, step: int) -> None:
    event = {"time": datetime.now(UTC).isoformat(), "type": "resumed", "step": step, "checkpoint": "c"}
    with path.open("a") as file:
        file.write(json.dumps(event, separators=(",", ":")) + "\n")


def write(path: Path, *events: Any) -> None:
    """Append events; a number is a step, and a negative number a resumption from that step."""
    for event in events:
        if isinstance(event, int) and event < 0:
            resumed(path, -event)
            continue
        log = EventLog(path)
        log.append(a_step(event) if isinstance(event, int) else event)
        log.close()


def page(service: PostTrainingService, **query: Any) -> dict[str, Any]:
    answer = ask(service, "GET", "/jobs/j/events", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def series(service: PostTrainingService, **query: Any) -> dict[str, Any]:
    answer = ask(service, "GET", "/jobs/j/metrics", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_events_come_in_pages_that_miss_nothing(service: PostTrainingService, job: str) -> None:
    path = folder_of(service, job).events
    assert page(service) == {"job_uuid": "j", "events": [], "cursor": 0, "unreadable": 0}
    write(path, Started(pid=1, versions={}), *range(1, 8), Message(text='a "type":"step" in words'))
    with path.open("ab") as file:
        file.write(b'{"type":"step","step":8,')  # still being written
    seen, cursor = [], 0
    while (found := page(service, cursor=cursor, limit=2))["events"]:
        assert len(found["events"]) <= 2
        seen += found["events"]
        cursor = found["cursor"]
    assert [event.get("step", event["type"]) for event in seen] == ["started", *range(1, 8), "message"]
    assert seen[1]["metrics"] == {"loss": 1.0}
    with path.open("ab") as file:
        file.write(a_step(8).model_dump_json().encode().removeprefix(b'{"type":"step","step":8,') + b"\n")
    rest = page(service, cursor=cursor)
    assert rest["cursor"] == path.stat().st_size
    assert page(service, cursor=2**62)["cursor"] == 2**62


def test_lines_that_are_not_events_are_counted(service: PostTrainingService, job: str) -> None:
    path = folder_of(service, job).events
    write(path, 1)
    with path.open("ab") as file:
        file.write(b"\x00\xff half of a li\n{}\n\n")
    write(path, 2)
    found = page(service)
    assert ([event["step"] for event in found["events"]], found["unreadable"]) == ([1, 2], 3)
    assert series(service)["steps"] == [1, 2]


def test_pages_are_bounded_in_bytes(service: PostTrainingService, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(timeline, "LINE_LIMIT_BYTES", 5000)
    path = folder_of(service, job).events
    write(path, Message(text="x" * 3000), *[Message(text="y" * 300)] * 9)
    with path.open("ab") as file:
        file.write(b"z" * 12_000)  # a line without an end
    sizes, cursor, unreadable = [], 0, 0
    while (found := page(service, cursor=cursor))["cursor"] != cursor:
        sizes.append(found["cursor"] - cursor)
        cursor, unreadable = found["cursor"], unreadable + found["unreadable"]
    assert max(sizes[1:-2]) <= 1000, "a page is small unless its first event is large"
    assert (cursor, unreadable) == (path.stat().st_size - 2000, 2), "the last piece may still become a line"


def test_a_nan_is_text_and_not_null(service: PostTrainingService, job: str) -> None:
    path = folder_of(service, job).events
    write(path, a_step(1, loss=float("nan"), grad_norm=float("inf"), lr=0.1))
    with path.open("a") as file:
        file.write('{"time":"2026-01-01T00:00:00Z","type":"step","step":2,"max_steps":9,"epoch":1.0,'
                   '"metrics":{"loss":NaN}}\n')  # fmt: skip
    assert [event["metrics"]["loss"] for event in page(service)["events"]] == ["NaN", "NaN"]
    found = series(service)
    assert found["metrics"] == {"loss": ["NaN", "NaN"], "grad_norm": ["Infinity", None], "lr": [0.1, None]}


def test_series_are_columns(service: PostTrainingService, job: str) -> None:
    path = folder_of(service, job).events
    write(
        path,
        Evaluation(step=0, epoch=0.0, metrics={"loss": 2.0, "accuracy": 0.5}),
        a_step(1, loss=1.5, lr=0.1),
        Routing(step=1, layers=[LayerRouting(layer=0, share=[1.0], min=1, max=1, cv=0, dead=0, load_entropy=0,
                                             token_entropy=0)]),
        a_step(2, loss=1.25, aux_loss=0.01),
        Evaluation(step=2, epoch=0.2, metrics={"loss": 1.75}),
    )  # fmt: skip
    assert series(service) == {
        "job_uuid": "j", "steps": [1, 2], "epoch": [0.1, 0.2],
        "metrics": {"loss": [1.5, 1.25], "lr": [0.1, None], "aux_loss": [None, 0.01]},
        "evaluations": [
            {"step": 0, "epoch": 0.0, "metrics": {"loss": 2.0, "accuracy": 0.5}},
            {"step": 2, "epoch": 0.2, "metrics": {"loss": 1.75}},
        ],
        "cursor": path.stat().st_size,
    }  # fmt: skip
    chosen = series(service, names="aux_loss, accuracy,none", since_step=1)
    assert (chosen["steps"], chosen["metrics"]) == ([2], {"aux_loss": [0.01]})
    assert [each["step"] for each in chosen["evaluations"]] == [2]
    assert series(service, since_step=2)["steps"] == []


@pytest.mark.parametrize(
    ("written", "standing"),
    [
        ([1, 2, 3, 4, 5, -3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ([1, 2, 3, 4, 5, -3], [1, 2, 3]),
        ([1, 2, 3, 4, -3, 4, 5, 6, -5, 6, 7], [1, 2, 3, 4, 5, 6, 7]),
        ([1, 2, 3, 4, 5, 6, -5, 6, 7, -2, 3], [1, 2, 3]),
        ([1, 2, 3, 1, 2], [1, 2]),
        ([-4, 5, 6], [5, 6]),
    ],
)
def test_steps_undone_by_a_resumption_are_hidden(
    service: PostTrainingService, job: str, written: list[int], standing: list[int]
) -> None:
    path = folder_of(service, job).events
    attempt = 0
    for number in written:
        attempt += number < 0
        write(path, number if number < 0 else a_step(number, attempt=attempt))
    found = series(service)
    assert found["steps"] == standing
    # The later version of a step counts.
    last_written = {}
    attempt = 0
    for number in written:
        attempt += number < 0
        if number > 0:
            last_written[number] = attempt
    assert found["metrics"]["attempt"] == [last_written[step] for step in standing]
    for after in range(8):
        assert series(service, since_step=after)["steps"] == [step for step in standing if step > after]


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 97, 1000])
@pytest.mark.parametrize("count", [1, 2, 11, 500])
def test_long_series_are_thinned_evenly(tmp_path: Path, limit: int, count: int) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for number in range(1, count + 1):
        log.append(a_step(number))
        if number == 400:
            resumed(path, 300)
            for again in range(301, 401):
                log.append(a_step(again))
    log.close()
    steps = timeline.metrics("j", path, None, None, limit).steps
    assert len(steps) <= limit
    assert steps == sorted(set(steps))
    assert steps[-1] == count
    if limit > 1:
        assert steps[0] == 1
    if count <= limit:
        assert steps == list(range(1, count + 1))
    elif limit > 2:
        gaps = [later - sooner for sooner, later in pairwise(steps)]
        assert len(steps) * 2 >= limit
        assert max(gaps) <= 4 * count / limit


@pytest.mark.parametrize(
    "query",
    ["events?cursor=-1", "events?limit=0", "events?limit=10001", f"events?cursor={2**63}", "metrics?limit=0",
     "metrics?limit=10001", "metrics?since_step=-1", "events?cursor=x", f"logs?offset={2**63}"],
)  # fmt: skip
def test_values_out_of_range_are_refused(service: PostTrainingService, job: str, query: str) -> None:
    answer = ask(service, "GET", f"/jobs/j/{query}")
    assert answer.status_code == 400
    name, _, value = query.partition("?")[2].partition("=")
    assert answer.json()["error"]["message"].startswith(f"{name}: {value!r} is not valid; expected ")


def test_events_of_some_types_alone(service: PostTrainingService, job: str) -> None:
    quoting = Message(text='another "type":"step" and "step":9')
    write(folder_of(service, job).events, Started(pid=1, versions={}), 1, quoting, 2)
    assert [event["type"] for event in page(service, types="step,started")["events"]] == ["started", "step", "step"]
    first = page(service, types="step", limit=1)
    assert [event["step"] for event in first["events"]] == [1]
    assert [event["step"] for event in page(service, types="step", cursor=first["cursor"])["events"]] == [2]
    answer = ask(service, "GET", "/jobs/j/events", params={"types": "Step!"})
    assert answer.status_code == 400


def test_events_continue_after_the_metrics(service: PostTrainingService, job: str) -> None:
    assert series(service)["cursor"] == 0
    write(folder_of(service, job).events, 1, 2)
    cursor = series(service)["cursor"]
    assert cursor == folder_of(service, job).events.stat().st_size
    with folder_of(service, job).events.open("ab") as file:
        file.write(b'{"time":"2026-01-01T00')
    assert series(service)["cursor"] == cursor, "a line that is being written comes later"
    folder_of(service, job).events.write_bytes(folder_of(service, job).events.read_bytes()[:cursor])
    write(folder_of(service, job).events, 3)
    assert [event["step"] for event in page(service, cursor=cursor)["events"]] == [3]
