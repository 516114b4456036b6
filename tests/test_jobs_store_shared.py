"""Laws of a job store that many threads and processes use at once."""

import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

import pytest
from sqlalchemy import Connection

from llama_stack_provider_moe.jobs import queue
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import JobStore
from tests.jobs_support import FORK, submit


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def submit_and_claim(url: str, name: str, n_jobs: int, claimed: "multiprocessing.Queue[list[str]]") -> None:
    mine: list[str] = []
    try:
        store = JobStore(url)
        for number in range(n_jobs):
            submit(store, f"{name}-{number}")
        while (job := store.claim(name)) is not None:
            mine.append(job.id)
        store.close()
    except Exception as error:  # noqa: BLE001  a process's exception would be lost
        mine.append(repr(error))
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


def between_the_queries(monkeypatch: pytest.MonkeyPatch, look: int, happens: Callable[[], object]) -> None:
    """Let something happen in the middle of the `look`-th look at the queue, before its last query."""
    owners, looks = queue._owners, itertools.count(1)

    def late(connection: Connection) -> dict[str, Any]:
        if next(looks) == look:
            happens()
        return owners(connection)

    monkeypatch.setattr(queue, "_owners", late)


@pytest.mark.parametrize("asked", ["claim", "position"])
def test_one_look_at_the_queue_is_of_one_moment(
    store: JobStore, url: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the last job that waits between two queries of the same look."""
    other = JobStore(url)
    submit(store, "job")

    def claimed_by_another() -> None:
        monkeypatch.undo()
        assert other.claim("another") is not None

    between_the_queries(monkeypatch, 1, claimed_by_another)
    if asked == "claim":
        assert store.claim("me") is None
    else:
        assert store.queue_position("job") == 1
    assert [(job.supervisor, job.attempts) for job in store.running()] == [("another", 1)]
    other.close()


def test_a_claim_takes_another_job_where_the_next_one_is_cancelled_meanwhile(
    new_postgres_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling waits for no claim on PostgreSQL; SQLite has one writer at a time."""
    url = new_postgres_url()
    store, other = JobStore(url), JobStore(url)
    submit(store, "first", "ann")
    submit(store, "second", "bob")
    between_the_queries(monkeypatch, 2, lambda: other.request_cancel("first", "ann"))
    job = store.claim("me")
    assert job is not None
    assert job.id == "second"
    assert store.get("first", None).state is JobState.CANCELLED
    store.close()
    other.close()


def claim_devices(url: str, name: str, claimed: "multiprocessing.Queue[list[str]]") -> None:
    mine: list[str] = []
    try:
        store = JobStore(url)
        while (job := store.claim(name, [str(device) for device in range(7)])) is not None:
            mine += (job.devices or "").split(",")
        store.close()
    except Exception as error:  # noqa: BLE001  a process's exception would be lost
        mine.append(repr(error))
    claimed.put(mine)


def test_no_device_is_given_to_two_jobs_by_claims_at_the_same_time(url: str) -> None:
    store = JobStore(url)
    for number in range(8):
        submit(store, f"job{number}", gpus=number % 2 + 1)
    store.close()
    claimed: multiprocessing.Queue[list[str]] = FORK.Queue()
    processes = [FORK.Process(target=claim_devices, args=(url, f"p{number}", claimed)) for number in range(4)]
    for process in processes:
        process.start()
    given = list(itertools.chain(*(claimed.get(timeout=60) for _ in processes)))
    for process in processes:
        process.join()
    assert sorted(given) == [str(device) for device in range(7)]


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


def test_a_change_is_seen_whoever_made_it(store: JobStore, url: str) -> None:
    assert store.has_changed(), "the first look knows nothing"
    quiet = url.startswith("sqlite")
    other = JobStore(url)
    store.has_changed()
    for write in (
        lambda: submit(store, "own"),
        lambda: submit(other, "another's"),
        lambda: other.request_cancel("own", None),
        lambda: store.acquire_lease("me", 1, 30),
    ):
        assert store.has_changed() != quiet
        write()
        assert store.has_changed()
    store.list(None)
    other.claim("nothing fits", [])
    other.close()
