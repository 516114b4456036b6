"""Labels, notes and filters of jobs: they find what they should, in exact pages, and cost little."""

import itertools
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import insert

from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.labels import LabelChange
from llama_stack_provider_moe.control.store.opening import open_engine
from llama_stack_provider_moe.control.store.schema import jobs_table, labels_table
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.errors import InvalidInput, NotFound
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.labels import MAX_LABELS
from tests.support.jobs_support import submit


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def ids(store: JobStore, whose: str | None = None, /, **wanted: object) -> list[str]:
    return [job.id for job in store.list(whose, chosen=JobFilter(**wanted))]  # type: ignore[arg-type]


def test_labels_are_set_changed_and_removed_one_by_one(store: JobStore) -> None:
    store.add(NewJob("job", "ann", "sft", "some/model", "/jobs/job", labels={"team": "geo", "run": "1"}, note="first"))
    found = store.label("job", "ann", LabelChange({"run": "2", "team": None, "new": ""}))
    assert (found.labels, found.job.note) == ({"new": "", "run": "2"}, "first")
    assert store.labels(["job"]) == {"job": {"new": "", "run": "2"}}
    assert store.label("job", None, LabelChange({}, None, sets_note=True)).job.note is None


def test_only_the_owner_labels_a_job(store: JobStore) -> None:
    submit(store, "job")
    with pytest.raises(NotFound, match="job 'job' does not exist"):
        store.label("job", "bob", LabelChange({"a": "b"}))
    assert store.labels(["job"]) == {}


def test_a_job_has_at_most_so_many_labels(store: JobStore) -> None:
    submit(store, "job")
    store.label("job", "ann", LabelChange({f"key{number}": "" for number in range(MAX_LABELS)}))
    with pytest.raises(InvalidInput, match=f"at most {MAX_LABELS} labels"):
        store.label("job", "ann", LabelChange({"more": ""}))
    store.label("job", "ann", LabelChange({"more": "", "key0": None}))
    assert len(store.labels(["job"])["job"]) == MAX_LABELS


def test_labels_go_with_their_job(store: JobStore) -> None:
    submit(store, "job")
    store.label("job", "ann", LabelChange({"a": "b"}))
    store.request_cancel("job", "ann")
    store.delete("job", "ann")
    submit(store, "job")
    assert store.labels(["job"]) == {}


def test_every_filter_finds_its_jobs(store: JobStore) -> None:
    submit(store, "plain")
    store.add(NewJob("tagged", "ann", "dpo", "Other/100%_model", "/jobs/tagged", labels={"team": "Geo", "x": ""}))
    store.add(NewJob("noted", "bob", "sft", "some/model", "/jobs/noted", note="About Rain", labels={"team": "art"}))
    store.request_cancel("noted", None)
    assert ids(store, states=(JobState.SCHEDULED,)) == ["tagged", "plain"]
    assert ids(store, states=(JobState.CANCELLED, JobState.FAILED)) == ["noted"]
    assert ids(store, recipe="dpo") == ids(store, model="Other/100%_model") == ["tagged"]
    assert ids(store, labels=(("team", None),)) == ["noted", "tagged"]
    assert ids(store, labels=(("team", "Geo"), ("x", ""))) == ["tagged"]
    assert ids(store, labels=(("team", "Geo"), ("x", "1"))) == []
    assert ids(store, owner="bob") == ["noted"]
    assert ids(store, "ann", owner="bob") == [], "a filter never widens what a caller sees"
    for text in ("rain", "NOTE", "art"):
        assert ids(store, text=text) == ["noted"], text
    assert ids(store, text="100%_") == ["tagged"]
    assert ids(store, text="0%m") == [], "a percent sign stands for itself"


def test_a_state_of_another_version_can_be_asked_for(store: JobStore, url: str) -> None:
    submit(store, "known")
    submit(store, "strange")
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(jobs_table.update().where(jobs_table.c.id == "strange").values(state="paused"))
    engine.dispose()
    assert ids(store, states=(JobState.UNREADABLE,)) == ["strange"]


def test_pages_of_a_filtered_list_are_exact(store: JobStore) -> None:
    for number in range(20):
        labels = {"third": "yes"} if number % 3 == 0 else {}
        store.add(NewJob(f"job{number}", "ann", "sft", "some/model", f"/jobs/{number}", labels=labels))
    wanted = JobFilter(labels=(("third", "yes"),))
    pages, after = [], None
    while page := store.list("ann", 2, after, wanted):
        pages.append([job.id for job in page])
        after = page[-1].id
    assert pages == [["job18", "job15"], ["job12", "job9"], ["job6", "job3"], ["job0"]]
    assert [job.id for job in store.list("ann", 2, "job10", wanted)] == ["job9", "job6"], "of any job before"


LIMIT_S = 0.25  # of processor time, which grows where other processes use the caches


def test_of_ten_thousand_jobs_a_page_is_found_at_once(store: JobStore, url: str) -> None:
    engine, moment = open_engine(url), now()
    rows = [
        {"id": f"job{number}", "owner": "ann" if number % 2 else "bob", "recipe": "sft", "model": f"a/m{number % 9}",
         "state": "completed", "scheduled_at": moment, "attempts": 1, "artifacts": "[]", "folder": f"/jobs/{number}",
         "queued_at": moment, "lost": 0, "turn": number, "note": "words " * 5}
        for number in range(10_000)
    ]  # fmt: skip
    labels = [{"job": f"job{number}", "key": "n", "value": str(number % 100)} for number in range(10_000)]
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(insert(jobs_table), rows)
        connection.execute(insert(labels_table), labels)
    if engine.dialect.name == "postgresql":  # which it does by itself soon after
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    engine.dispose()
    cases = [
        JobFilter(), JobFilter(labels=(("n", "7"),)), JobFilter(text="nowhere"), JobFilter(text="m3"),
        JobFilter(states=(JobState.FAILED,)), JobFilter(model="a/m1", labels=(("n", None),)),
    ]  # fmt: skip
    for owner, wanted in itertools.product(("ann", None), cases):
        took = []
        for _ in range(3):
            start = time.process_time()  # the machine may be busy with something else
            found = store.list(owner, 101, None, wanted)
            store.labels(job.id for job in found)
            took.append(time.process_time() - start)
        assert min(took) < LIMIT_S, (owner, wanted, took)
