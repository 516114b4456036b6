"""Laws of the job store."""

import itertools
import multiprocessing
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Queue

import pytest

from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.schema import SCHEMA_VERSION
from llama_stack_provider_moe.jobs.state import MOVES, JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore
from tests.jobs_support import FORK, ram_folder


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def url(root: Path) -> str:
    return f"sqlite:///{root}/state/jobs.db"


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def submit(store: JobStore, job_id: str, owner: str = "ann") -> Job:
    return store.submit(job_id, owner, "sft", "some/model", f"/jobs/{job_id}")


def brought_to(store: JobStore, state: JobState, job_id: str = "job") -> Job:
    """A new job, taken to `state` by legal moves."""
    job = submit(store, job_id)
    if state is JobState.SCHEDULED:
        return job
    if state is not JobState.CANCELLED:
        job = store.move(job_id, JobState.IN_PROGRESS)
    return job if state is JobState.IN_PROGRESS else store.move(job_id, state)


# A job's life.


def test_a_job_comes_back_as_it_went_in(store: JobStore) -> None:
    before = now()
    submitted = submit(store, "job")
    assert store.get("job", "ann") == submitted
    assert (submitted.id, submitted.owner, submitted.recipe) == ("job", "ann", "sft")
    assert (submitted.state, submitted.attempts, submitted.folder) == (JobState.SCHEDULED, 0, "/jobs/job")
    assert before <= submitted.scheduled_at <= now()
    assert submitted.scheduled_at.tzinfo is UTC


def test_a_claim_takes_the_oldest_and_counts_the_attempt(store: JobStore) -> None:
    for job_id in ("first", "second"):
        submit(store, job_id)
    claimed = store.claim("me")
    assert claimed is not None
    assert (claimed.id, claimed.state, claimed.attempts, claimed.supervisor) == ("first", "in_progress", 1, "me")
    assert claimed.started_at is not None
    assert claimed.started_at >= claimed.scheduled_at
    assert [job.id for job in store.running()] == ["first"]
    assert store.queue_position("first") == 0
    assert store.queue_position("second") == 1
    assert (store.claim("me"), store.claim("me")) != (None, None)
    assert store.claim("me") is None


def test_artifacts_survive_the_move(store: JobStore) -> None:
    artifact = Artifact(
        identifier="job/adapter", kind="adapter", path="/jobs/job/artifacts/adapter", epoch=1, step=7,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC), bytes=9,
    )  # fmt: skip
    brought_to(store, JobState.IN_PROGRESS)
    store.move("job", JobState.COMPLETED, artifacts=(artifact,))
    ended = store.get("job", None)
    assert ended.artifacts == (artifact,)
    assert ended.ended_at is not None


@pytest.mark.parametrize(("old", "new"), list(itertools.product(JobState, JobState)))
def test_every_move_is_legal_or_refused_and_then_changes_nothing(store: JobStore, old: JobState, new: JobState) -> None:
    before = brought_to(store, old)
    if new in MOVES[old]:
        after = store.move("job", new, "why")
        assert (after.state, after.reason) == (new, "why")
        assert (after.ended_at is not None) == new.ended
    else:
        with pytest.raises(Conflict, match=f"{old.value}; it can't become {new.value}"):
            store.move("job", new, "why")
        assert store.get("job", None) == before


def test_an_id_is_taken_for_every_owner(store: JobStore) -> None:
    submit(store, "job", "ann")
    for owner in ("ann", "bob"):
        with pytest.raises(Conflict, match="'job' exists already"):
            submit(store, "job", owner)


def test_a_stranger_sees_nothing(store: JobStore) -> None:
    submit(store, "job", "ann")
    assert store.list("bob") == []
    for look in (store.get, store.request_cancel):
        with pytest.raises(NotFound, match="'job'"):
            look("job", "bob")
    with pytest.raises(NotFound):
        store.list("bob", after="job")
    assert store.get("job", None).state is JobState.SCHEDULED


def test_pages_are_whole_newest_first_and_an_owners_own(store: JobStore) -> None:
    for number in range(7):
        submit(store, f"job{number}", "ann")
        submit(store, f"other{number}", "bob")
    pages, after = [], None
    while page := store.list("ann", limit=3, after=after):
        pages.append([job.id for job in page])
        after = page[-1].id
    assert pages == [["job6", "job5", "job4"], ["job3", "job2", "job1"], ["job0"]]
    assert len(store.list(None)) == 14


def test_counts_name_every_state(store: JobStore) -> None:
    for number, state in enumerate(JobState):
        brought_to(store, state, f"job{number}")
    submit(store, "another")
    assert store.counts() == {state: 2 if state is JobState.SCHEDULED else 1 for state in JobState}


# Cancelling.


def test_cancelling_a_waiting_job_ends_it_and_a_running_one_is_marked(store: JobStore) -> None:
    submit(store, "waits")
    cancelled = store.request_cancel("waits", "ann")
    assert (cancelled.state, cancelled.ended_at) == (JobState.CANCELLED, cancelled.cancel_requested_at)
    assert store.claim("me") is None
    brought_to(store, JobState.IN_PROGRESS, "runs")
    marked = store.request_cancel("runs", "ann")
    assert (marked.state, marked.ended_at) == (JobState.IN_PROGRESS, None)
    assert marked.cancel_requested_at is not None


@pytest.mark.parametrize("state", list(JobState))
def test_cancelling_is_idempotent_or_refused(store: JobStore, state: JobState) -> None:
    brought_to(store, state)
    if state in (JobState.COMPLETED, JobState.FAILED):
        with pytest.raises(Conflict, match=f"is {state.value}"):
            store.request_cancel("job", "ann")
        return
    once = store.request_cancel("job", "ann")
    assert store.request_cancel("job", "ann") == once == store.get("job", None)


def test_the_first_process_recorded_is_the_jobs(store: JobStore) -> None:
    submit(store, "job")
    with pytest.raises(Conflict, match="scheduled"):
        store.launched("job", 10, 1.5)
    store.claim("me")
    assert (store.launched("job", 10, 1.5).pid, store.get("job", None).pid_birth) == (10, 1.5)
    with pytest.raises(Conflict, match="process 10"):
        store.launched("job", 11, 2.5)


# The lease.


def test_one_supervisor_at_a_time(store: JobStore) -> None:
    assert store.live_supervisor() is None
    assert store.acquire_lease("one", 1, 30)
    assert not store.acquire_lease("two", 2, 30)
    assert store.acquire_lease("one", 1, 30), "its own lease may be taken again"
    assert not store.beat("two", 30)
    assert not store.release_lease("two", only_if_idle=False)
    live = store.live_supervisor()
    assert live is not None
    assert (live.id, live.pid) == ("one", 1)
    assert store.release_lease("one", only_if_idle=False)
    assert store.live_supervisor() is None
    assert not store.beat("one", 30)
    assert store.acquire_lease("two", 2, 30)


@pytest.mark.parametrize("shift_s", [31.0, -31.0])
def test_a_lease_runs_out_also_when_the_clock_was_set_back(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, shift_s: float
) -> None:
    clock = began = now()
    monkeypatch.setattr("llama_stack_provider_moe.jobs.store.now", lambda: clock)
    assert store.acquire_lease("one", 1, 30)
    clock = began + timedelta(seconds=shift_s)
    assert store.live_supervisor() is None
    assert store.beat("one", 30), "late, but nobody else has come"
    assert store.live_supervisor() is not None
    clock = began
    assert store.acquire_lease("two", 2, 30)
    assert not store.beat("one", 30)


@pytest.mark.parametrize("state", list(JobState))
def test_an_idle_lease_is_released_only_without_work(store: JobStore, state: JobState) -> None:
    store.acquire_lease("one", 1, 30)
    brought_to(store, state)
    assert store.release_lease("one", only_if_idle=True) == state.ended
    assert (store.live_supervisor() is None) == state.ended


def test_no_job_is_stranded_by_a_supervisor_that_leaves(store: JobStore, url: str) -> None:
    """A server submits, then looks for a supervisor; one leaves meanwhile: it stays, or the server sees it gone."""
    server = JobStore(url)
    outcomes = set()
    for number, first in enumerate(["the submission", "the leaving", *["either"] * 60]):
        store.acquire_lease("leaving", 1, 30)
        released: Queue[bool] = Queue()

        def leave(released: Queue[bool] = released) -> None:
            released.put(store.release_lease("leaving", only_if_idle=True))

        thread = threading.Thread(target=leave)
        if first != "the submission":
            thread.start()
        if first == "the leaving":
            thread.join()
        submit(server, f"job{number}")
        if first == "the submission":
            thread.start()
        seen_alive = server.live_supervisor() is not None
        thread.join()
        gone = released.get()
        assert not (gone and seen_alive), f"round {number}: stranded"
        assert gone or first != "the leaving"
        outcomes.add(gone)
        server.request_cancel(f"job{number}", None)
    server.close()
    assert outcomes == {True, False}


# Many processes.


def submit_and_claim(url: str, name: str, n_jobs: int, claimed: "multiprocessing.Queue[list[str]]") -> None:
    store = JobStore(url)
    for number in range(n_jobs):
        submit(store, f"{name}-{number}")
    mine: list[str] = []
    while (job := store.claim(name)) is not None:
        mine.append(job.id)
    store.close()
    claimed.put(mine)


def test_each_job_is_claimed_once_by_processes_that_hammer_one_new_store(url: str) -> None:
    claimed: multiprocessing.Queue[list[str]] = FORK.Queue()
    names = [f"p{number}" for number in range(4)]
    processes = [FORK.Process(target=submit_and_claim, args=(url, name, 10, claimed)) for name in names]
    for process in processes:
        process.start()
    each = [claimed.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    store = JobStore(url)
    leftover: list[str] = []
    while (job := store.claim("last")) is not None:
        leftover.append(job.id)
    everyone = [*itertools.chain(*each), *leftover]
    assert len(everyone) == 40
    assert set(everyone) == {f"{name}-{number}" for name in names for number in range(10)}
    assert [job.attempts for job in store.running()] == [1] * 40
    store.close()


def test_threads_share_a_store(store: JobStore) -> None:
    failures: Queue[Exception] = Queue()

    def work(name: str) -> None:
        try:
            for number in range(10):
                submit(store, f"{name}-{number}")
                store.claim(name)
                store.list("ann")
        except Exception as error:  # noqa: BLE001  a thread's exception would be lost
            failures.put(error)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures.empty(), failures.get()
    assert store.counts()[JobState.IN_PROGRESS] == 40


# The database.


def test_folder_and_files_are_private(store: JobStore, root: Path) -> None:
    submit(store, "job")
    assert stat.S_IMODE((root / "state").stat().st_mode) == 0o700
    for path in (root / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_processes_that_come_and_go_leave_the_writers_connected(store: JobStore, url: str, root: Path) -> None:
    """Opening a second store must not drop the first one's locks, see `schema._make_private_file`."""
    look = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT id FROM moe_jobs').fetchall())"

    def seen_from_outside() -> str:
        path = root / "state" / "jobs.db"
        return subprocess.run([sys.executable, "-SsE", "-c", look, path], capture_output=True, text=True).stdout

    submit(store, "one")
    second = JobStore(url)
    assert seen_from_outside() == "('one',)\n"
    submit(store, "two")
    assert seen_from_outside() == "('one',) ('two',)\n"
    second.close()


def test_a_newer_schema_is_refused_and_left_alone(store: JobStore, url: str, root: Path) -> None:
    submit(store, "job")
    store.close()
    with sqlite3.connect(root / "state" / "jobs.db") as database:
        database.execute("UPDATE moe_schema SET version = ?", (SCHEMA_VERSION + 1,))
    database.close()
    with pytest.raises(InvalidInput, match=f"version {SCHEMA_VERSION}; this one has version {SCHEMA_VERSION + 1}"):
        JobStore(url)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "no url at all"])
def test_a_store_that_no_other_process_could_see_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="store_url"):
        JobStore(url)


def test_a_store_says_whether_it_answers(store: JobStore, root: Path) -> None:
    assert store.answers()
    store.close()
    for path in (root / "state").iterdir():
        path.unlink()
    (root / "state" / "jobs.db").write_bytes(b"this is no database" * 1000)
    assert not store.answers()
