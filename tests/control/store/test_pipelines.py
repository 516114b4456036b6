"""Laws of pipelines in the store: all parts or none, a state that follows from them, resumed without what completed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.pipeline_rows import NewPipeline
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.store.wait_rows import Wait
from llama_stack_provider_moe.errors import Conflict, NotFound, OverLimit
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from tests.control.store.test_waits import broken, claimed, end, export_of, ready, resolve
from tests.support.jobs_support import submit

NO_LIMITS = LimitsConfig()
WAITS = {"a": (), "b": (), "mix": ("a", "b"), "last": ("mix",)}


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    assert store.acquire_lease("me", 1, 60)
    yield store
    store.close()


def new_pipeline(name: str = "p", owner: str = "ann", **more: Any) -> NewPipeline:
    parts = []
    for part, waits in WAITS.items():
        found = tuple(Wait(f"{name}-{each}") for each in waits)
        new = NewJob(f"{name}-{part}", owner, "sft", "m", f"/j/{name}-{part}", pipeline=name, waits=found, **more)
        parts.append((new, part))
    return NewPipeline(name, owner, parts)


def state_of(store: JobStore) -> JobState:
    return store.pipelines.get("p", "ann").found.state


def settle(store: JobStore) -> None:
    """What the supervisor does."""
    while found := broken(store):
        for job_id, why in found.items():
            store.move(job_id, JobState.FAILED, why)
    for job_id in ready(store):
        resolve(store, job_id)


def test_parts_run_in_the_order_of_what_they_name(store: JobStore) -> None:
    store.pipelines.add(new_pipeline(), NO_LIMITS)
    found = store.pipelines.get("p", "ann")
    assert [(part.name, part.job) for part in found.parts] == [(name, f"p-{name}") for name in WAITS]
    assert found.waits == {"p-mix": ["p-a", "p-b"], "p-last": ["p-mix"]}
    assert state_of(store) is JobState.SCHEDULED
    for expected in (["p-a", "p-b"], ["p-mix"], ["p-last"]):
        settle(store)
        assert claimed(store) == expected
        assert state_of(store) is JobState.IN_PROGRESS
        for job_id in expected:
            end(store, job_id)
    assert state_of(store) is JobState.COMPLETED
    assert store.pipelines.list("ann", 9)[0].counts == {JobState.COMPLETED: 4}
    assert len(store.list("ann", chosen=JobFilter(pipeline="p"))) == 4


def test_a_pipeline_is_inserted_as_a_whole_or_not_at_all(store: JobStore) -> None:
    submit(store, "p-last")
    with pytest.raises(Conflict, match="pipeline 'p', or a job with its name and that of a part, exists already"):
        store.pipelines.add(new_pipeline(), NO_LIMITS)
    with pytest.raises(OverLimit, match=r"you have 1 jobs that wait, .* and 4 are needed"):
        store.pipelines.add(new_pipeline("q"), LimitsConfig(waiting_jobs=4))
    assert [job.id for job in store.list(None)] == ["p-last"]
    assert store.pipelines.list(None, 9) == []
    assert len(store.pipelines.add(new_pipeline("q"), LimitsConfig(waiting_jobs=5))) == 4


def test_a_failed_part_fails_those_after_it_and_resuming_revives_them_alone(store: JobStore) -> None:
    store.pipelines.add(new_pipeline(), NO_LIMITS)
    assert claimed(store) == ["p-a", "p-b"]
    end(store, "p-a")
    end(store, "p-b", JobState.FAILED, reason="diverged")
    settle(store)
    found = store.pipelines.get("p", "ann")
    assert found.found.counts == {JobState.COMPLETED: 1, JobState.FAILED: 3}
    assert found.jobs["p-mix"].reason == "job 'p-b', which it waits for, failed: diverged"
    assert state_of(store) is JobState.FAILED
    with pytest.raises(OverLimit):
        store.pipelines.resume("p", "ann", LimitsConfig(waiting_jobs=2))
    assert [job.id for job in store.pipelines.resume("p", "ann", NO_LIMITS)] == ["p-b", "p-mix", "p-last"]
    assert (state_of(store), claimed(store)) == (JobState.IN_PROGRESS, ["p-b"])
    for job_id in ("p-b", "p-mix", "p-last"):
        end(store, job_id)
        settle(store)
        claimed(store)
    assert state_of(store) is JobState.COMPLETED
    assert store.get("p-a", None).attempts == 1
    with pytest.raises(Conflict, match="pipeline 'p' has no part that failed or was cancelled"):
        store.pipelines.resume("p", "ann", NO_LIMITS)


def test_cancelling_ends_what_waits_and_a_cancelled_pipeline_can_be_resumed(store: JobStore) -> None:
    store.pipelines.add(new_pipeline(), NO_LIMITS)
    assert claimed(store) == ["p-a", "p-b"]
    end(store, "p-a")
    assert store.pipelines.request_cancel("p", "ann").found.state is JobState.IN_PROGRESS
    assert (claimed(store), ready(store), broken(store)) == ([], [], {})
    end(store, "p-b", JobState.CANCELLED)
    again = store.pipelines.request_cancel("p", "ann")
    assert again.found.state is JobState.CANCELLED
    assert again.jobs["p-mix"].reason == "cancelled with its pipeline before it started"
    store.pipelines.resume("p", "ann", NO_LIMITS)
    assert (state_of(store), claimed(store)) == (JobState.IN_PROGRESS, ["p-b"])


def test_exports_of_parts_belong_to_it(store: JobStore) -> None:
    store.pipelines.add(new_pipeline(), NO_LIMITS)
    claimed(store)
    end(store, "p-a", export=export_of("p-a"))
    end(store, "p-b")
    found = store.pipelines.get("p", "ann")
    assert [job.id for job in found.exports_of("p-a")] == ["export-p-a"]
    store.pipelines.request_cancel("p", "ann")
    assert store.get("export-p-a", None).state is JobState.CANCELLED
    assert "export-p-a" in [job.id for job in store.pipelines.resume("p", None, NO_LIMITS)]


def test_a_part_that_needs_a_job_outside_is_not_revived_without_it(store: JobStore) -> None:
    submit(store, "outside")
    part = NewJob("p-a", "ann", "sft", "m", "/j/p-a", pipeline="p", waits=(Wait("outside"),))
    store.pipelines.add(NewPipeline("p", "ann", [(part, "a")]), NO_LIMITS)
    end(store, "outside", JobState.FAILED)
    settle(store)
    with pytest.raises(Conflict, match="'p-a' can't be resumed: job 'outside', which it waits for, failed"):
        store.pipelines.resume("p", "ann", NO_LIMITS)
    store.resume("outside", "ann")
    store.pipelines.resume("p", "ann", NO_LIMITS)
    assert claimed(store) == ["outside"]


def test_each_owner_sees_their_own_in_exact_pages_and_it_goes_with_its_last_part(store: JobStore) -> None:
    for number in range(4):
        store.pipelines.add(new_pipeline(f"p{number}", "ann" if number % 2 else "bob"), NO_LIMITS)
    assert [each.pipeline.id for each in store.pipelines.list("bob", 1)] == ["p2"]
    assert [each.pipeline.id for each in store.pipelines.list("bob", 2, "p2")] == ["p0"]
    for look in (
        store.pipelines.get,
        store.pipelines.request_cancel,
        lambda name, owner: store.pipelines.resume(name, owner, NO_LIMITS),
    ):
        with pytest.raises(NotFound, match="pipeline 'p0' does not exist"):
            look("p0", "ann")
    store.pipelines.request_cancel("p0", "bob")
    for name in reversed(WAITS):
        store.delete(f"p0-{name}", "bob")
    with pytest.raises(NotFound):
        store.pipelines.get("p0", "bob")
    store.pipelines.add(new_pipeline("p0"), NO_LIMITS)


def test_a_pipeline_that_lost_a_part_is_neither_resumed_nor_completed(store: JobStore) -> None:
    store.pipelines.add(new_pipeline(), NO_LIMITS)
    assert claimed(store) == ["p-a", "p-b"]
    end(store, "p-a")
    end(store, "p-b")
    settle(store)
    claimed(store)
    end(store, "p-mix")
    store.pipelines.request_cancel("p", "ann")
    store.delete("p-last", "ann")
    assert store.pipelines.get("p", "ann").found.lost == ["last"]
    assert state_of(store) is JobState.CANCELLED
    with pytest.raises(Conflict, match="'p' can't be resumed: the job of part 'last' was deleted before it had compl"):
        store.pipelines.resume("p", "ann", NO_LIMITS)
    submit(store, "p-last")  # any job of that name is not the part
    assert store.pipelines.list("ann", 9)[0].lost == ["last"]
    for job_id in ("p-mix", "p-b", "p-a"):
        store.delete(job_id, "ann")
    assert store.pipelines.list("ann", 9) == []


def test_a_completed_part_may_be_deleted_and_a_failed_one_makes_a_failed_pipeline(store: JobStore) -> None:
    both = [(NewJob(f"p-{name}", "ann", "sft", "m", f"/j/p-{name}", pipeline="p"), name) for name in "abc"]
    store.pipelines.add(NewPipeline("p", "ann", both), NO_LIMITS)
    assert claimed(store) == ["p-a", "p-b", "p-c"]
    end(store, "p-a")
    end(store, "p-b")
    end(store, "p-c", JobState.FAILED, reason="diverged")
    store.delete("p-b", "ann")
    assert (store.pipelines.get("p", "ann").found.lost, state_of(store)) == ((), JobState.FAILED)
    store.delete("p-c", "ann")
    assert (store.pipelines.get("p", "ann").found.lost, state_of(store)) == (["c"], JobState.FAILED)


def test_a_pipeline_that_has_ended_is_not_cancelled(store: JobStore) -> None:
    part = NewJob("p-a", "ann", "sft", "m", "/j/p-a", pipeline="p")
    store.pipelines.add(NewPipeline("p", "ann", [(part, "a")]), NO_LIMITS)
    assert claimed(store) == ["p-a"]
    end(store, "p-a")
    with pytest.raises(Conflict, match="pipeline 'p' has ended: it is completed; there is nothing to cancel"):
        store.pipelines.request_cancel("p", "ann")
    assert store.pipelines.get("p", "ann").found.pipeline.cancel_requested_at is None


HOOK = '{"url": "https://hooks.example.com/moe"}'


def told(store: JobStore) -> list[tuple[str, Any]]:
    """The job that each message about the pipeline is listed with, and what it tells."""
    found = []
    for job in store.list(None):
        for message in store.outbox.of(job.id):
            assert (message.url, message.event) == ("https://hooks.example.com/moe", "moe.pipeline.ended")
            found.append((job.id, json.loads(message.body)["data"]))
    return found


def test_one_message_tells_of_the_end_of_a_whole_pipeline(store: JobStore) -> None:
    """After its last job, exports included; and again if it is resumed."""
    store.pipelines.add(new_pipeline()._replace(notify=HOOK), NO_LIMITS)
    for expected in (["p-a", "p-b"], ["p-mix"], ["p-last"]):
        settle(store)
        assert claimed(store) == expected
        for job_id in expected:
            assert told(store) == []
            end(store, job_id, export=export_of(job_id) if job_id == "p-last" else None)
    assert told(store) == [], "the export of the last part is part of it"
    assert claimed(store) == ["export-p-last"]
    end(store, "export-p-last", JobState.FAILED)
    parts = {name: {"job_uuid": f"p-{name}", "status": "completed"} for name in WAITS}
    failed = {"pipeline_uuid": "p", "status": "failed", "jobs": {"completed": 4, "failed": 1}, "parts": parts,
              "lost": []}  # fmt: skip
    assert told(store) == [("export-p-last", failed)]
    assert store.has_work(), "the supervisor stays until it is delivered"
    store.pipelines.resume("p", "ann", NO_LIMITS)
    assert claimed(store) == ["export-p-last"]
    end(store, "export-p-last")
    done = {**failed, "status": "completed", "jobs": {"completed": 5}}
    assert told(store) == [("export-p-last", failed), ("export-p-last", done)]


def test_a_pipeline_whose_part_fails_is_told_of_once_the_parts_behind_it_have_failed_too(store: JobStore) -> None:
    store.pipelines.add(new_pipeline()._replace(notify=HOOK), NO_LIMITS)
    claimed(store)
    end(store, "p-a")
    end(store, "p-b", JobState.FAILED)
    assert told(store) == []
    settle(store)
    ((_, data),) = told(store)
    assert (data["status"], data["jobs"], data["parts"]["mix"]["status"]) == (
        "failed", {"completed": 1, "failed": 3}, "failed",
    )  # fmt: skip


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_pipeline_that_is_cancelled_before_it_began_is_told_of_once(store: JobStore, one_by_one: bool) -> None:
    store.pipelines.add(new_pipeline()._replace(notify=HOOK), NO_LIMITS)
    if one_by_one:
        for name in WAITS:
            assert told(store) == []
            store.request_cancel(f"p-{name}", None)
    else:
        store.pipelines.request_cancel("p", "ann")
        store.pipelines.request_cancel("p", "ann")
    ((job_id, data),) = told(store)
    assert (job_id, data["status"], data["jobs"]) == ("p-last", "cancelled", {"cancelled": 4})


def test_a_running_pipeline_that_is_cancelled_is_told_of_when_its_last_job_has_stopped(store: JobStore) -> None:
    store.pipelines.add(new_pipeline()._replace(notify=HOOK), NO_LIMITS)
    claimed(store)
    store.pipelines.request_cancel("p", "ann")
    end(store, "p-a", JobState.CANCELLED)
    assert told(store) == []
    end(store, "p-b", JobState.CANCELLED)
    assert [data["status"] for _, data in told(store)] == ["cancelled"]


def test_a_damaged_notify_keeps_no_job_from_its_end(store: JobStore) -> None:
    store.pipelines.add(new_pipeline()._replace(notify="{"), NO_LIMITS)
    store.pipelines.request_cancel("p", "ann")
    assert (state_of(store), told(store)) == (JobState.CANCELLED, [])
