"""Laws of the queue: fair between owners, first come first served within an owner, no job waits for ever."""

import itertools
import random
from collections import Counter

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.jobs_support import submit


def claim(store: JobStore, *devices: str) -> tuple[str, str | None] | None:
    job = store.claim("me", devices)
    return None if job is None else (job.id, job.devices)


def complete(store: JobStore, *job_ids: str) -> None:
    for job_id in job_ids:
        store.move(job_id, JobState.COMPLETED)


def test_an_owner_with_many_jobs_does_not_hold_up_another(store: JobStore) -> None:
    for job_id in ("ann1", "ann2", "ann3", "bob1", "bob2", "cid1"):
        submit(store, job_id, job_id[:3])
    claimed = [job.id for job in iter(lambda: store.claim("me"), None)]
    assert claimed == ["ann1", "bob1", "cid1", "ann2", "bob2", "ann3"]


def test_of_owners_with_nothing_running_the_one_served_longest_ago_is_next(store: JobStore) -> None:
    for job_id in ("ann1", "ann2", "bob1", "bob2"):
        submit(store, job_id, job_id[:3])
    order = []
    for _ in range(4):  # one at a time
        job = store.claim("me")
        assert job is not None
        order.append(job.id)
        complete(store, job.id)
    assert order == ["ann1", "bob1", "ann2", "bob2"]


@pytest.mark.parametrize("seed", range(12))
def test_positions_tell_the_order_of_the_claims(store: JobStore, seed: int) -> None:
    """For several owners, with jobs that waited, ran, ended, were lost or resumed."""
    dice = random.Random(seed)
    waiting: set[str] = set()
    for number in range(30):
        job_id = f"job{number}"
        submit(store, job_id, f"owner{dice.randrange(5)}")
        waiting.add(job_id)
        while waiting and dice.random() < 0.5:
            job = store.claim("me")
            assert job is not None
            waiting.remove(job.id)
            fate = dice.choice(["runs", "lost", "failed", "resumed"])
            if fate == "lost":
                store.requeue(job.id, "killed")
            elif fate in ("failed", "resumed"):
                store.move(job.id, JobState.FAILED)
            if fate == "resumed":
                store.resume(job.id, None)
            if fate in ("lost", "resumed"):
                waiting.add(job.id)
    told = {store.queue_position(job_id): job_id for job_id in waiting}
    claimed = [job.id for job in iter(lambda: store.claim("me"), None)]
    assert set(claimed) == waiting
    assert [told.get(place) for place in range(1, len(claimed) + 1)] == claimed


# Devices.


def test_no_device_is_given_twice_and_each_is_given_back(store: JobStore) -> None:
    for number, gpus in enumerate([1, 2, 1, 1]):
        submit(store, f"job{number}", gpus=gpus)
    devices = ("0", "1", "2")
    assert [claim(store, *devices) for _ in range(3)] == [("job0", "0"), ("job1", "1,2"), None]
    complete(store, "job1")
    assert [claim(store, *devices) for _ in range(2)] == [("job2", "1"), ("job3", "2")]
    assert store.get("job1", None).devices == "1,2", "what it ran on is still known"


def test_a_job_that_says_nothing_gets_one_device_where_there_are_any(store: JobStore) -> None:
    for number in range(4):
        submit(store, f"job{number}")
    submit(store, "on-the-cpu", gpus=0)
    assert claim(store, "GPU-1", "GPU-2") == ("job0", "GPU-1")
    assert claim(store) == ("job1", ""), "a server that gives out none"
    unknown = store.claim("me", None)
    assert unknown is not None
    assert (unknown.id, unknown.devices) == ("job2", None), "left to the machine"
    assert claim(store, "GPU-1") == ("on-the-cpu", "")


def test_a_job_that_needs_many_devices_is_not_overtaken_for_ever(store: JobStore) -> None:
    """Small jobs of the same and another owner keep coming; a job that needs all devices still gets its turn."""
    devices = ("0", "1", "2", "3")
    names = (f"small{number}" for number in itertools.count())
    running: list[str] = []

    def small_ones() -> None:
        for owner in ("ann", "bob"):
            submit(store, next(names), owner, gpus=1)

    small_ones()
    running += [job.id for job in (store.claim("me", devices), store.claim("me", devices)) if job]
    submit(store, "large", "ann", gpus=4)
    for _ in range(10):
        small_ones()
        while (job := store.claim("me", devices)) is not None and job.id != "large":
            running.append(job.id)
        if job is not None:
            assert job.devices == "0,1,2,3"
            break
        complete(store, running.pop(0))
    else:
        pytest.fail("it starves")
    assert claim(store, *devices) is None
    complete(store, "large")
    assert claim(store, *devices) is not None


def test_devices_are_kept_for_one_job_and_jobs_without_go_ahead(store: JobStore) -> None:
    submit(store, "runs", gpus=1)
    assert claim(store, "0", "1") == ("runs", "0")
    submit(store, "large", "bob", gpus=2)
    submit(store, "small", "cid", gpus=1)
    submit(store, "cpu", "cid", gpus=0)
    assert claim(store, "0", "1") == ("cpu", "")
    assert claim(store, "0", "1") is None
    assert [store.queue_position(job_id) for job_id in ("large", "small")] == [1, 2]
    complete(store, "runs")
    assert claim(store, "0", "1") == ("large", "0,1")


def test_what_can_never_fit_holds_nobody_up_and_is_named(store: JobStore) -> None:
    submit(store, "too-large", gpus=3)
    submit(store, "fits", gpus=2)
    assert [job.id for job in store.asking_for_more(2)] == ["too-large"]
    assert claim(store, "0", "1") == ("fits", "0,1")
    assert claim(store, "0", "1") is None
    assert store.queue_position("too-large") == 1


def test_a_lost_jobs_devices_are_free_again(store: JobStore) -> None:
    submit(store, "job", gpus=2)
    assert claim(store, "0", "1") == ("job", "0,1")
    store.requeue("job", "killed")
    assert claim(store, "0", "1") == ("job", "0,1")


def test_the_turns_are_as_many_as_the_submissions(store: JobStore) -> None:
    """Each turn belongs to one job, however many are submitted and resumed, so the order has no ties."""
    for number in range(5):
        submit(store, f"job{number}", f"owner{number}")
        store.request_cancel(f"job{number}", None)
    for number in reversed(range(5)):
        store.resume(f"job{number}", None)
    assert Counter(store.queue_position(f"job{number}") for number in range(5)) == Counter(range(1, 6))
    assert store.queue_position("job4") == 1
