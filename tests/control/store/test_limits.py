"""Laws of the limits of owners, on both databases."""

import threading
from datetime import timedelta

import pytest
from sqlalchemy import update

from llama_stack_provider_moe.control.store.limits import DAY, Stretch, Use
from llama_stack_provider_moe.control.store.schema import jobs_table
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.errors import OverLimit
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from tests.support.jobs_support import submit

HOUR = timedelta(hours=1)


def new(job_id: str, owner: str = "ann", gpus: int | None = None) -> NewJob:
    return NewJob(job_id, owner, "sft", "some/model", f"/jobs/{job_id}", gpus)


def began(store: JobStore, job_id: str, ago: timedelta) -> None:
    """The job was claimed `ago`."""
    with store._writing.begin() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id == job_id).values(started_at=now() - ago))


def used(store: JobStore, job_id: str, hours: float, owner: str = "ann") -> None:
    """A job of one GPU that ran for so many hours until now."""
    submit(store, job_id, owner, gpus=1)
    assert store.claim("me", ["0"]) is not None
    began(store, job_id, hours * HOUR)
    store.move(job_id, JobState.COMPLETED)


def test_an_owner_has_so_many_jobs_waiting(store: JobStore) -> None:
    limits = LimitsConfig(waiting_jobs=2)
    store.add(new("a1"), limits)
    store.add(new("a2"), limits)
    with pytest.raises(OverLimit, match="you have 2 jobs that wait, and this server allows 2") as refused:
        store.add(new("a3"), limits)
    assert refused.value.retry_after_s == 60
    store.add(new("b1", "bob"), limits)
    store.request_cancel("a1", "ann")
    store.add(new("a3"), limits)
    with pytest.raises(OverLimit):
        store.resume("a1", "ann", limits)
    assert store.get("a1", "ann").state is JobState.CANCELLED
    assert [job.id for job in store.list("ann")] == ["a3", "a2", "a1"]


def test_of_many_submissions_at_once_as_many_pass_as_may(url: str) -> None:
    limits, passed, refused = LimitsConfig(waiting_jobs=3), [], []
    stores = [JobStore(url) for _ in range(8)]
    ready = threading.Barrier(len(stores))

    def add(number: int) -> None:
        ready.wait()
        try:
            passed.append(stores[number].add(new(f"job{number}"), limits).id)
        except OverLimit as error:
            refused.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), len(refused)) == (3, 5)
    assert len(stores[0].list("ann")) == 3
    for store in stores:
        store.close()


def test_claims_respect_the_limit_of_running_jobs_and_stay_fair(store: JobStore) -> None:
    limits = LimitsConfig(running_jobs=2)
    for job_id in ("ann1", "ann2", "ann3", "ann4", "bob1", "cid1"):
        submit(store, job_id, job_id[:3])

    def claimed() -> list[str]:
        return [job.id for job in iter(lambda: store.claim("me", owner_limits=limits), None)]

    assert claimed() == ["ann1", "bob1", "cid1", "ann2"]
    assert claimed() == []
    store.move("ann1", JobState.COMPLETED)
    assert claimed() == ["ann3"]


def test_a_lost_job_waits_for_the_limit_too(store: JobStore) -> None:
    limits = LimitsConfig(running_jobs=1)
    submit(store, "ann1")
    submit(store, "ann2")
    assert store.claim("me", owner_limits=limits) is not None
    store.requeue("ann1", "killed")
    claims = [store.claim("me", owner_limits=limits) for _ in range(2)]
    assert [None if job is None else job.id for job in claims] == ["ann1", None]


def test_no_device_is_kept_for_an_owner_at_the_limit(store: JobStore) -> None:
    limits = LimitsConfig(running_jobs=1)
    submit(store, "ann1", gpus=1)
    assert store.claim("me", ["0", "1"], owner_limits=limits) is not None
    submit(store, "ann2", gpus=2)
    submit(store, "bob1", "bob", gpus=1)
    job = store.claim("me", ["0", "1"], owner_limits=limits)
    assert job is not None
    assert (job.id, job.devices) == ("bob1", "1")


def test_gpu_hours_count_deleted_jobs_and_running_ones(store: JobStore) -> None:
    limits = LimitsConfig(gpu_hours_per_day=5)
    used(store, "a1", hours=3)
    store.delete("a1", "ann")
    submit(store, "a2", gpus=2)
    assert store.claim("me", ["0", "1"], owner_limits=limits) is not None
    began(store, "a2", HOUR / 2)
    assert store.use_of("ann").gpu_hours == pytest.approx(4, abs=0.01)
    store.add(new("a3"), limits)
    began(store, "a2", HOUR)
    with pytest.raises(OverLimit, match=r"used 5\.00 GPU-hours in 24 hours, and this server allows 5") as refused:
        store.add(new("a4"), limits)
    # The first GPU-hour began 3 hours ago, so some is free when the 24 hours of it are over.
    assert refused.value.retry_after_s == pytest.approx(21 * 3600, abs=300)
    assert store.use_of("bob").gpu_hours == 0
    store.add(new("b1", "bob"), limits)


def test_a_job_that_was_lost_and_resumed_counts_each_time(store: JobStore) -> None:
    submit(store, "a1", gpus=1)
    assert store.claim("me", ["0"]) is not None
    began(store, "a1", HOUR)
    store.requeue("a1", "killed")
    assert store.claim("me", ["0"]) is not None
    began(store, "a1", 2 * HOUR)
    store.move("a1", JobState.FAILED)
    assert store.use_of("ann").gpu_hours == pytest.approx(3, abs=0.01)


def test_jobs_without_gpus_start_when_gpu_hours_are_used(store: JobStore) -> None:
    limits = LimitsConfig(gpu_hours_per_day=1)
    used(store, "a1", hours=2)
    submit(store, "on-gpu", gpus=1)
    submit(store, "on-cpu", gpus=0)
    submit(store, "bob1", "bob", gpus=1)
    claims = [store.claim("me", ["0", "1"], owner_limits=limits) for _ in range(3)]
    assert {job.id for job in claims if job is not None} == {"on-cpu", "bob1"}


def test_when_hours_are_free_again() -> None:
    at = now()
    use = Use(0, 0, (Stretch(2, at - 10 * HOUR, at - 8 * HOUR), Stretch(1, at - 30 * HOUR, at - 22 * HOUR)), at)
    assert use.gpu_hours == pytest.approx(6)  # 4, and the 2 of the older one that are within the day
    assert use.gpus_free_at(7) is None
    assert use.gpus_free_at(5) == pytest.approx(at + HOUR, abs=timedelta(seconds=1))
    free_at = use.gpus_free_at(3)
    assert free_at is not None
    assert free_at - (at - 10 * HOUR + DAY) == pytest.approx(HOUR / 2, abs=timedelta(seconds=1))


def test_owners_are_those_of_jobs_and_of_gpu_time(store: JobStore) -> None:
    used(store, "a1", hours=1)
    store.delete("a1", "ann")
    submit(store, "b1", "bob")
    assert store.owners() == {"ann", "bob"}
