"""Laws of jobs that wait for jobs: passed over until all others completed, failed if one of them ends otherwise."""

from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.references import Uses
from llama_stack_provider_moe.control.store.store import Job, JobStore, NewJob
from llama_stack_provider_moe.control.store.transitions import Fence
from llama_stack_provider_moe.control.store.wait_rows import Wait
from llama_stack_provider_moe.errors import Conflict, LeaseLost, NotFound, Superseded
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.jobs_support import submit

NOTHING = Uses((), ())


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    assert store.acquire_lease("me", 1, 60)
    yield store
    store.close()


def wait(store: JobStore, job_id: str, *used: str, through_export: bool = False, **more: Any) -> Job:
    waits = tuple(Wait(each, through_export) for each in used)
    return store.add(NewJob(job_id, "ann", "sft", "m", f"/jobs/{job_id}", waits=waits, **more))


def end(store: JobStore, job_id: str, state: JobState = JobState.COMPLETED, **more: Any) -> None:
    if store.get(job_id, None).state is JobState.SCHEDULED:
        store.move(job_id, JobState.IN_PROGRESS)
    store.move(job_id, state, **more)


def resolve(store: JobStore, job_id: str, uses: Uses = NOTHING) -> None:
    job = store.get(job_id, None)
    store.waits.resolved(job, uses, Fence.of("me", job))


def ready(store: JobStore) -> list[str]:
    return [job.id for job in store.waits.due().ready]


def broken(store: JobStore) -> dict[str, str]:
    return {job.id: why for job, why in store.waits.due().broken}


def claimed(store: JobStore, devices: list[str] | None = None) -> list[str]:
    return [job.id for job in iter(lambda: store.claim("me", devices), None)]


def test_it_is_passed_over_until_all_others_have_completed(store: JobStore) -> None:
    submit(store, "a")
    submit(store, "b")
    wait(store, "both", "a", "b")
    submit(store, "later")
    assert store.waits.of_jobs(["both", "later"]) == {"both": ["a", "b"]}
    assert [store.queue_position(name) for name in ("a", "b", "both", "later")] == [1, 2, 0, 3]
    assert [(job.id, position) for job, position in store.first_waiting("ann", 9)[0]] == [
        ("a", 1), ("b", 2), ("later", 3), ("both", 0)
    ]  # fmt: skip
    assert claimed(store) == ["a", "b", "later"]
    end(store, "a")
    assert store.waits.of_jobs(["both"]) == {"both": ["b"]}
    assert (ready(store), broken(store)) == ([], {})
    end(store, "b")
    assert ready(store) == ["both"]
    assert claimed(store) == [], "its names are not resolved yet"
    assert store.has_work(), "a supervisor may not leave"
    resolve(store, "both")
    assert (ready(store), store.queue_position("both")) == ([], 1)
    assert claimed(store) == ["both"]


def test_it_takes_and_keeps_no_device(store: JobStore) -> None:
    submit(store, "a", gpus=1)
    wait(store, "after", "a", gpus=2)
    submit(store, "b", gpus=1)
    assert claimed(store, ["0", "1"]) == ["a", "b"]
    end(store, "a")
    resolve(store, "after")
    assert claimed(store, ["0", "1"]) == []
    assert store.get("after", None).state is JobState.SCHEDULED
    end(store, "b")
    assert claimed(store, ["0", "1"]) == ["after"]


@pytest.mark.parametrize(
    ("state", "told"), [(JobState.FAILED, "failed: why"), (JobState.CANCELLED, "was cancelled: why")]
)
def test_one_that_does_not_complete_breaks_those_that_wait_down_the_chain(
    store: JobStore, state: JobState, told: str
) -> None:
    submit(store, "a")
    wait(store, "b", "a")
    wait(store, "c", "b")
    end(store, "a", state, reason="why")
    assert broken(store) == {"b": f"job 'a', which it waits for, {told}"}
    store.move("b", JobState.FAILED, broken(store)["b"])
    assert broken(store) == {"c": f"job 'b', which it waits for, failed: job 'a', which it waits for, {told}"}


def test_it_waits_on_while_the_other_is_tried_again_or_resumed(store: JobStore) -> None:
    submit(store, "a")
    wait(store, "b", "a")
    assert claimed(store) == ["a"]
    store.requeue("a", "killed")
    assert (ready(store), broken(store)) == ([], {})
    end(store, "a", JobState.FAILED)
    assert list(broken(store)) == ["b"]
    store.resume("a", None)
    assert (ready(store), broken(store)) == ([], {})


def test_it_is_resumed_only_if_the_other_may_still_complete(store: JobStore) -> None:
    submit(store, "a")
    wait(store, "b", "a")
    end(store, "a", JobState.FAILED)
    store.move("b", JobState.FAILED)
    with pytest.raises(Conflict, match="'b' can't be resumed: job 'a', which it waits for, failed; resume that one"):
        store.resume("b", None)
    store.resume("a", None)
    store.resume("b", None)
    assert claimed(store) == ["a"], "it waits again"
    store.request_cancel("b", None)
    end(store, "a")
    store.resume("b", None)
    assert ready(store) == ["b"]


def test_files_that_it_will_need_are_kept(store: JobStore) -> None:
    submit(store, "a")
    wait(store, "b", "a")
    end(store, "a")
    with pytest.raises(Conflict, match=r"job 'a' is needed by job 'b' \(scheduled\)"):
        store.delete("a", "ann")
    resolve(store, "b", Uses((), ("a", "gone")))
    with pytest.raises(Conflict, match=r"needed by job 'b'"):
        store.delete("a", "ann")
    end(store, "b")
    store.delete("a", "ann")


def test_a_later_job_of_the_same_name_is_not_waited_for(store: JobStore) -> None:
    submit(store, "a")
    wait(store, "b", "a")
    end(store, "a")
    store.delete("a", "ann", force=lambda _: None)
    store.submit("a", "bob", "sft", "m", "/jobs/a")
    end(store, "a")
    assert (ready(store), broken(store)) == ([], {"b": "job 'a', which it waits for, was deleted"})
    store.move("b", JobState.FAILED)
    with pytest.raises(Conflict, match="was deleted; resume that one first, or submit this one again"):
        store.resume("b", None)
    store.delete("b", "ann")


def test_it_can_wait_only_for_what_exists_and_may_complete(store: JobStore) -> None:
    for name, state in (("failed", JobState.FAILED), ("cancelled", JobState.CANCELLED)):
        submit(store, name)
        end(store, name, state)
        with pytest.raises(Conflict, match=f"job '{name}' is {name}; a job can't wait for it until it is resumed"):
            wait(store, "b", name)
    with pytest.raises(NotFound, match="job 'none', whose files this job needs, no longer exists"):
        wait(store, "b", "none")
    with pytest.raises(NotFound, match="job 'b'"):
        wait(store, "b", "b")
    submit(store, "done")
    end(store, "done")
    wait(store, "b", "done")
    assert ready(store) == ["b"], "it completed between check and insertion"


def export_of(job_id: str) -> NewJob:
    return NewJob(f"export-{job_id}", "ann", "export", "m", f"/jobs/export-{job_id}", 0, job_id)


def test_it_waits_for_the_export_that_the_other_makes(store: JobStore) -> None:
    submit(store, "a")
    wait(store, "adapter", "a")
    wait(store, "merged", "a", through_export=True)
    end(store, "a", export=export_of("a"))
    assert store.waits.of_jobs(["adapter", "merged"]) == {"merged": ["export-a"]}
    assert ready(store) == ["adapter"]
    wait(store, "merged-2", "a", through_export=True)
    assert store.waits.of_jobs(["merged-2"]) == {"merged-2": ["export-a"]}, "it came after the export"
    end(store, "export-a", JobState.FAILED, reason="disk")
    told = "job 'export-a', which it waits for, failed: disk"
    assert broken(store) == {"merged": told, "merged-2": told}
    store.resume("export-a", None)
    end(store, "export-a")
    assert ready(store) == ["adapter", "merged", "merged-2"]


def test_without_an_export_it_goes_on_and_is_told_so_by_its_checks(store: JobStore) -> None:
    submit(store, "a")
    wait(store, "merged", "a", through_export=True)
    end(store, "a", reason="completed, but not exported: ...")
    assert ready(store) == ["merged"]


def test_only_the_supervisor_that_saw_it_unchanged_has_it_start(store: JobStore) -> None:
    submit(store, "a")
    job = wait(store, "b", "a")
    with pytest.raises(Conflict, match="job 'b' waits again"):
        store.waits.resolved(job, Uses((), ()), Fence.of("me", job))
    end(store, "a")
    with pytest.raises(LeaseLost):
        store.waits.resolved(job, Uses((), ()), Fence.of("another", job))
    store.request_cancel("b", None)
    with pytest.raises(Superseded):
        store.waits.resolved(job, Uses((), ()), Fence.of("me", job))
    store.resume("b", None)
    assert ready(store) == ["b"]
