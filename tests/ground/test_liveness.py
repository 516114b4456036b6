"""Laws for signs of life: what a stage reports, how often, and what the status shows."""

import importlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from llama_stack_provider_moe.compute.runtime import reporting
from llama_stack_provider_moe.control.cli import screen, show, views
from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.liveness import Work
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.jobs_support import submit


class Clock:
    """`time.monotonic`, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("llama_stack_provider_moe.ground.liveness.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def told() -> Iterator[list[Work]]:
    """What is reported in this test."""
    reports: list[Work] = []
    with liveness.reports_to(reports.append):
        yield reports


def test_a_stage_reports_its_start_its_end_and_the_time_in_between(clock: Clock, told: list[Work]) -> None:
    """A thousand rows in 25 s are four lines, not a thousand."""
    for _ in liveness.counted("tokenising", range(1000), 1000, "rows"):
        clock.now += 0.025
    assert [(work.stage, work.total, work.unit) for work in told] == [("tokenising", 1000, "rows")] * 4
    assert [work.done for work in told] == [0, pytest.approx(400, abs=2), pytest.approx(800, abs=2), 1000]


def test_a_stage_that_hangs_is_silent(clock: Clock, told: list[Work]) -> None:
    with liveness.stage("evaluating", 10, "batches") as counter:
        counter.advance()
        clock.now += 100_000
        assert told == [Work("evaluating", 0, 10, "batches")]
        counter.advance()
        assert told[1:] == [Work("evaluating", 2, 10, "batches")]


def test_no_thread_reports_for_a_stage(told: list[Work]) -> None:
    before = threading.active_count()
    with liveness.stage("evaluating", 10, "batches"):
        assert threading.active_count() == before
    assert len(told) == 1


def test_a_generator_may_outlive_the_stage_around_it(told: list[Work]) -> None:
    """A traceback may keep it alive: when it is closed later, it ends no other stage and raises nothing."""
    rows = liveness.counted("reading rows", range(3), 3, "rows")
    with liveness.stage("loading"):
        next(rows)
    with liveness.stage("training") as counter:
        rows.close()
        told.clear()
        counter.at(1, stage="training more")
    assert told[0] == Work("training more", 1, None, "steps")


def test_a_piece_of_a_unit_is_a_sign_of_life(clock: Clock, told: list[Work]) -> None:
    """For example one layer of a batch that takes minutes."""
    liveness.alive()
    assert not told, "outside of any stage there is nothing to report"
    with liveness.stage("evaluating", 10, "batches"):
        for _ in range(30):
            clock.now += 5
            liveness.alive()
    assert told == [Work("evaluating", 0, 10, "batches")] * 16


def test_an_inner_stage_is_reported_in_place_of_the_outer_one(clock: Clock, told: list[Work]) -> None:
    with liveness.stage("training", unit="micro-batches") as outer:
        with liveness.stage("evaluating", 2, "batches") as inner:
            clock.now += 60
            outer.at(5)  # not what is under way
            inner.advance(2)
        outer.at(6, 8)
    assert told == [
        Work("training", 0, None, "micro-batches"),
        Work("evaluating", 0, 2, "batches"),
        Work("evaluating", 2, 2, "batches"),
        Work("training", 5, None, "micro-batches"),
        Work("training", 6, 8, "micro-batches"),
    ]


def test_threads_of_a_server_have_stages_that_overlap() -> None:
    begun = [threading.Barrier(2) for _ in range(3)]

    def first() -> None:
        with liveness.stage("verifying one job's checkpoint"):
            begun[0].wait(20)
            begun[1].wait(20)
        begun[2].wait(20)

    def second() -> None:
        begun[0].wait(20)
        with liveness.stage("verifying another's"):
            begun[1].wait(20)
            begun[2].wait(20)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(first), pool.submit(second)]:
            each.result()


def test_a_stage_that_fails_is_not_reported_as_done(told: list[Work]) -> None:
    with pytest.raises(ZeroDivisionError):
        list(liveness.counted("merging", (1 / number for number in (1, 0)), 2, "tensors"))
    assert [work.done for work in told] == [0]
    liveness.alive()
    assert len(told) == 1, "it is over"


def test_another_sign_counts(clock: Clock, told: list[Work]) -> None:
    """While steps write their own events, a stage adds none."""
    with liveness.stage("training", unit="micro-batches") as counter:
        for _ in range(100):
            clock.now += 8
            counter.advance()
            liveness.heard()
            clock.now += 1
            liveness.alive()
        assert len(told) == 1


def test_what_another_process_reports_is_relayed(told: list[Work]) -> None:
    with liveness.stage("comparing logits") as counter:
        counter.relay(Work("loading weights", 1, 9, "tensors"))
    assert told == [Work("comparing logits", 0, None, "steps"), Work("loading weights", 1, 9, "tensors")]


def test_reports_become_events_or_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 writes events; other processes print a few lines."""
    path = tmp_path / "events.jsonl"
    with closing(events.EventLog(path)) as log, reporting.reported_to(log, leads=True), liveness.stage("merging"):
        pass
    (event,) = events.read(path).events
    assert (event.type, event.stage, event.done, event.total, event.unit) == ("progress", "merging", 0, None, "steps")
    assert capsys.readouterr().out == ""
    with closing(events.EventLog(path)) as log, reporting.reported_to(log, leads=False), liveness.stage("merging"):
        pass
    assert capsys.readouterr().out == "", "its start was a moment ago"
    monkeypatch.setattr(reporting, "LINE_EVERY_S", 0.0)
    with (
        closing(events.EventLog(path)) as log,
        reporting.reported_to(log, leads=False),
        liveness.stage("merging", 2000, "tensors"),
    ):
        pass
    assert capsys.readouterr().out == "merging: 0 of 2,000 tensors\n"
    assert len(events.read(path).events) == 1


def test_each_module_that_is_imported_counts(monkeypatch: pytest.MonkeyPatch, told: list[Work]) -> None:
    monkeypatch.setattr(liveness, "EVERY_S", 0.0)
    with reporting.imports_counted(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("a_module_that_nobody_has")
    assert told[-1] == Work("importing libraries", 1, None, "modules")


@pytest.fixture
def job(store: JobStore, tmp_path: Path) -> Iterator[tuple[Job, JobFolder, events.EventLog]]:
    """A job in progress with a folder, and the log of its events."""
    submit(store, "job")
    claimed = store.claim("me/1/1/1/1")
    assert claimed is not None
    folder = JobFolder(tmp_path)
    with closing(events.EventLog(folder.events)) as log:
        yield claimed, folder, log


def test_a_status_names_the_stage_and_how_far_it_is(job: tuple[Job, JobFolder, events.EventLog]) -> None:
    claimed, folder, log = job
    assert progress(claimed, folder)["stage"] == "starting"

    def after(event: Any) -> tuple[str, Any]:
        log.append(event)
        found = progress(claimed, folder)
        return found["stage"], found["work"]

    imports = events.Progress(stage="importing libraries", done=3, unit="modules")
    assert after(imports) == ("importing libraries", {"done": 3, "total": None, "unit": "modules"})
    assert after(events.Started(pid=1, versions={})) == ("loading", None)
    loading = events.Progress(stage="loading weights", done=0, total=25, unit="tensors")
    assert after(loading) == ("loading weights", {"done": 0, "total": 25, "unit": "tensors"})
    evaluating = {"done": 1, "total": 8, "unit": "batches"}
    assert after(events.Progress(stage="evaluating", **evaluating)) == ("evaluating", evaluating)
    assert after(events.Step(step=1, max_steps=9, epoch=0.1, metrics={})) == ("training", None)
    assert after(events.Message(text="of no stage")) == ("training", None)
    assert after(events.Progress(stage="saving a checkpoint", done=0))[0] == "saving a checkpoint"
    assert after(events.Finished(train_seconds=1.0)) == ("saving", None)
    assert after(events.Progress(stage="merging the adapter", done=1, total=2))[0] == "merging the adapter"
    again = events.Progress(stage="importing libraries", done=0)
    assert after(again)[0] == "importing libraries", "of a later start, where the first one's steps stand before it"
    found = progress(claimed, folder)
    assert (found["step"], found["max_steps"]) == (1, 9)


def test_a_reader_that_does_not_know_an_event_goes_on(tmp_path: Path) -> None:
    """A process of another version wrote it."""
    path = tmp_path / "events.jsonl"
    with closing(events.EventLog(path)) as log:
        log.append(events.Step(step=1, max_steps=2, epoch=0.5, metrics={}))
    with path.open("a") as file:
        file.write(json.dumps({"time": "2025-01-01T00:00:00Z", "type": "hereafter", "what": 1}) + "\n")
    assert list(events.latest(path)) == ["hereafter", "step"]
    assert [event.type for event in events.read(path).events] == ["step", "hereafter"]


def a_status(**resources: Any) -> dict[str, Any]:
    known = {"stage": "training", "step": None, "max_steps": None, "work": None} | resources
    return {"job_uuid": "j", "status": "in_progress", "checkpoints": [], "resources_allocated": known}


WORK = {"done": 3, "total": 25, "unit": "tensors"}


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (WORK, "3 of 25 tensors"),
        (WORK | {"total": None}, "3 tensors"),
        ({"done": 1_500_000, "total": 3_000_000_000, "unit": "bytes"}, "1.5 MB of 3 GB"),
        ({"done": 0, "total": None, "unit": "steps"}, ""),
        (None, ""),
    ],
)
def test_a_line_and_a_bar_say_how_far_the_stage_is(work: Any, said: str) -> None:
    status = a_status(stage="loading weights", work=work)
    told = f"loading weights, {said}" if said else "loading weights"
    assert show.standing(status) == f"in_progress ({told})"
    with Progress(disable=True) as drawn:
        bar = views.Bar(screen.Screen(as_json=False), drawn)
        bar.show(status)
        (task,) = drawn.tasks
        assert task.fields["steps"] == said
        if said:
            assert (task.completed, task.total) == (work["done"], work["total"])
        bar.show(a_status(step=2, max_steps=8))
        assert (task.completed, task.total, task.fields["steps"]) == (2, 8, "2 of 8")
