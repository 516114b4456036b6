"""Laws of the job store."""

import itertools
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from queue import Queue

import pytest

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import MOVES, JobState
from tests.support.jobs_support import submit

# Those that a row may have; what is `unreadable` is in `test_jobs_upgrade`.
STATES = [state for state in JobState if state is not JobState.UNREADABLE]
ARTIFACTS = (
    Artifact(
        identifier="job/adapter", kind="adapter", path="/jobs/job/artifacts/adapter", epoch=1, step=7,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC), bytes=9,
    ),
)  # fmt: skip


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def moved(store: JobStore, job_id: str, new: JobState, reason: str) -> Job:
    """Move a job to `new` by the method for that move."""
    if new is not JobState.SCHEDULED:
        return store.move(job_id, new, reason)
    if store.get(job_id, None).state is JobState.IN_PROGRESS:
        return store.requeue(job_id, reason)
    return store.resume(job_id, None)


def brought_to(store: JobStore, state: JobState, job_id: str = "job") -> Job:
    """A new job, moved to `state` by legal moves."""
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
    brought_to(store, JobState.IN_PROGRESS)
    store.move("job", JobState.COMPLETED, artifacts=ARTIFACTS)
    ended = store.get("job", None)
    assert ended.artifacts == ARTIFACTS
    assert ended.ended_at is not None


@pytest.mark.parametrize(("old", "new"), list(itertools.product(STATES, STATES)))
def test_every_move_is_legal_or_refused_and_then_changes_nothing(store: JobStore, old: JobState, new: JobState) -> None:
    before = brought_to(store, old)
    if new in MOVES[old]:
        after = moved(store, "job", new, "why")
        resumed = old.ended and new is JobState.SCHEDULED
        assert (after.state, after.reason) == (new, None if resumed else "why")
        assert (after.ended_at is not None) == new.ended
    else:
        with pytest.raises(Conflict, match=f"'job' (is|has) ({old.value}|completed)"):
            moved(store, "job", new, "why")
        assert store.get("job", None) == before


def test_ended_is_what_no_supervisor_moves_on() -> None:
    assert {state for state in JobState if state.ended} == {JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}
    assert all(MOVES[state] <= {JobState.SCHEDULED} for state in JobState if state.ended)


def test_an_id_is_taken_for_every_owner(store: JobStore) -> None:
    submit(store, "job", "ann")
    for owner in ("ann", "bob"):
        with pytest.raises(Conflict, match="'job' exists already"):
            submit(store, "job", owner)


def test_a_stranger_sees_nothing(store: JobStore) -> None:
    submit(store, "job", "ann")
    assert store.list("bob") == []
    for look in (store.get, store.request_cancel, store.resume, store.delete):
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
    for number, state in enumerate(STATES):
        brought_to(store, state, f"job{number}")
    submit(store, "another")
    counted = {state: 2 if state is JobState.SCHEDULED else 1 for state in STATES}
    assert store.counts() == counted | {JobState.UNREADABLE: 0}


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


@pytest.mark.parametrize("state", STATES)
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


# Trying again, going on, deleting.


def lost(store: JobStore, job_id: str, times: int = 1) -> Job:
    """A waiting job that was claimed (no other job may wait) and lost so many times."""
    for _ in range(times):
        claimed = store.claim("me")
        assert claimed is not None
        assert claimed.id == job_id
        store.launched(job_id, 10, 1.5)
        job = store.requeue(job_id, "killed", ARTIFACTS)
    return job


def test_a_lost_job_waits_again_before_all_others_and_says_why(store: JobStore) -> None:
    submit(store, "job")
    once = lost(store, "job")
    assert (once.state, once.lost, once.reason, once.artifacts) == ("scheduled", 1, "killed", ARTIFACTS)
    assert (once.pid, once.pid_birth, once.supervisor, once.devices, once.ended_at) == (None,) * 5
    assert once.queued_at > once.scheduled_at
    for owner in ("ann", "bob"):
        submit(store, f"of-{owner}", owner)
    assert [store.queue_position(job_id) for job_id in ("job", "of-ann", "of-bob")] == [1, 3, 2]
    again = store.claim("me")
    assert again is not None
    assert (again.id, again.attempts, again.lost, again.reason) == ("job", 2, 1, "killed")


def test_a_lost_job_that_was_to_be_cancelled_is_not_tried_again(store: JobStore) -> None:
    before = brought_to(store, JobState.IN_PROGRESS)
    before = store.request_cancel("job", None)
    with pytest.raises(Conflict, match="cancelled"):
        store.requeue("job", "killed")
    assert store.get("job", None) == before


def test_a_job_cancelled_while_it_waits_to_be_tried_again_keeps_what_it_saved(store: JobStore) -> None:
    submit(store, "job")
    lost(store, "job")
    cancelled = store.request_cancel("job", None)
    assert (cancelled.state, cancelled.artifacts) == (JobState.CANCELLED, ARTIFACTS)
    assert cancelled.reason == "cancelled while it waited to resume"


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_a_resumed_job_is_as_new_but_for_what_it_did(store: JobStore, state: JobState) -> None:
    submit(store, "job")
    lost(store, "job", 2)
    store.claim("me")
    store.request_cancel("job", None)
    ended = store.move("job", state, "why", ARTIFACTS)
    submit(store, "other")
    job = store.resume("job", "ann")
    assert (job.state, job.lost, job.reason, job.ended_at, job.cancel_requested_at, job.pid) == (
        "scheduled",
        0,
        *[None] * 4,
    )
    assert (job.attempts, job.artifacts, job.scheduled_at) == (3, ARTIFACTS, ended.scheduled_at)
    assert job.queued_at > ended.queued_at
    assert [store.queue_position(job_id) for job_id in ("other", "job")] == [1, 2], "it queues at the end"
    with pytest.raises(Conflict, match="is scheduled; only a cancelled or failed job can be resumed"):
        store.resume("job", "ann")


def test_nothing_is_left_to_resume_of_a_completed_job(store: JobStore) -> None:
    brought_to(store, JobState.IN_PROGRESS)
    completed = store.move("job", JobState.COMPLETED, stopped_by="time_budget")
    assert completed.stopped_by == "time_budget"
    with pytest.raises(Conflict, match="'job' has completed"):
        store.resume("job", "ann")
    assert store.get("job", None) == completed


@pytest.mark.parametrize("state", STATES)
def test_only_what_has_ended_is_deleted(store: JobStore, state: JobState) -> None:
    job = brought_to(store, state)
    if not state.ended:
        with pytest.raises(Conflict, match=f"is {state.value}"):
            store.delete("job", "ann")
        assert store.get("job", None) == job
        return
    assert store.delete("job", "ann") == [job]
    for look in (store.get, store.delete):
        with pytest.raises(NotFound):
            look("job", None)
    assert submit(store, "job").attempts == 0, "its id is free again"


def test_a_job_whose_folder_can_not_be_removed_stays(store: JobStore) -> None:
    job = brought_to(store, JobState.FAILED)

    def first(seen: Job) -> None:
        assert seen == job
        raise OSError("read-only file system")

    with pytest.raises(OSError, match="read-only"):
        store.delete("job", "ann", first)
    assert store.get("job", None) == job


def test_jobs_that_ended_before_a_moment_the_oldest_first(store: JobStore) -> None:
    for number, state in enumerate(STATES):
        brought_to(store, state, f"early{number}")
    store.resume("early3", None)
    moment = now()
    brought_to(store, JobState.FAILED, "late")
    assert [job.id for job in store.ended_before(moment)] == ["early2", "early4"]
    assert [job.id for job in store.ended_before(moment, limit=1)] == ["early2"]
    assert [job.id for job in store.ended_before(now())] == ["early2", "early4", "late"]


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
    monkeypatch.setattr("llama_stack_provider_moe.control.store.lease.now", lambda: clock)
    assert store.acquire_lease("one", 1, 30)
    clock = began + timedelta(seconds=shift_s)
    assert store.live_supervisor() is None
    assert store.beat("one", 30), "late, but nobody else has come"
    assert store.live_supervisor() is not None
    clock = began
    assert store.acquire_lease("two", 2, 30)
    assert not store.beat("one", 30)


@pytest.mark.parametrize("state", STATES)
def test_an_idle_lease_is_released_only_without_work(store: JobStore, state: JobState) -> None:
    store.acquire_lease("one", 1, 30)
    brought_to(store, state)
    assert store.release_lease("one", only_if_idle=True) == state.ended
    assert (store.live_supervisor() is None) == state.ended


def test_no_job_is_stranded_by_a_supervisor_that_leaves(store: JobStore, url: str) -> None:
    """A server submits and then looks for a supervisor while one leaves: it stays, or the server sees that it left."""
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
