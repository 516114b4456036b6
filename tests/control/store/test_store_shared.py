"""Laws for a job store that many threads and processes use at once."""

import itertools
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.control.server import guard
from llama_stack_provider_moe.control.store import queue
from llama_stack_provider_moe.control.store.schema import supervisor_table
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import FORK, submit


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
    """Do something in the middle of the `look`-th read of the queue, before its last query."""
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
    """Another process takes the last waiting job between two queries of the same read."""
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
    """On PostgreSQL a cancellation does not wait for a claim; SQLite has one writer at a time."""
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


def test_there_is_a_connection_for_every_thread_of_a_server_that_asks(url: str, tmp_path: Path) -> None:
    """A thread that waited for a connection in vain would report the store as lost."""
    service_guard = guard.Guard(ProviderConfig(state_dir=tmp_path), lambda: guard.LOST_HEALTH)
    pools = (service_guard._watch._calls, service_guard._watch._probes, service_guard._places)
    threads = sum(pool._threads for pool in pools) + 2  # the supervisor's keeper, and the exporter of figures
    store = JobStore(url)
    with ExitStack() as stack:
        stack.callback(store.close)
        for _ in range(threads):
            connection = stack.enter_context(store._reading.connect())
            assert connection.execute(select(supervisor_table.c.id)).scalar_one() == 1


def test_a_database_that_says_nothing_is_not_waited_for() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(OperationalError):
            JobStore(f"postgresql+psycopg://moe@127.0.0.1:{silent.getsockname()[1]}/moe")
        assert time.monotonic() - began < 60, "libpq itself waits for more than two minutes"
