"""Laws for supervisors that come and go, each a separate process, with real but tiny training processes."""

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor
from llama_stack_provider_moe.control.supervisor.processes import birth, is_alive
from llama_stack_provider_moe.control.supervisor.starting import ensure_supervisor
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor, supervise
from llama_stack_provider_moe.control.supervisor.supervisor_keeper import SupervisorKeeper
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import (
    FORK,
    LONG,
    ended,
    new_job,
    new_supervisor,
    reap,
    run_until_idle,
    started,
    tiny_config,
    wait_for,
    wait_until_ended,
)


@pytest.fixture
def supervisor_process(config: ProviderConfig) -> Iterator[Callable[[], BaseProcess]]:
    """Start supervisors, each in a separate process; end those that are left."""
    processes: list[BaseProcess] = []

    def start(config: ProviderConfig = config) -> BaseProcess:
        process = FORK.Process(target=supervise, args=(config,))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_child_outlives_a_killed_supervisor_and_is_adopted(
    config: ProviderConfig, supervisor_process: Callable[[], BaseProcess]
) -> None:
    first = supervisor_process()
    store = JobStore(config.url)
    folder = new_job(store, config, "job", steps=40, step_s=0.05)
    pid = started(folder)
    first.kill()
    first.join()
    assert birth(pid) is not None
    assert JobFolder(folder).read_manifest() is None
    store.close()
    supervisor_process()
    store = JobStore(config.url)
    job = wait_until_ended(store, "job")
    assert (job.state, job.pid, job.attempts) == (JobState.COMPLETED, pid, 1)
    assert (folder / "launches").read_text().split() == [str(pid)]
    steps = [event.step for event in read(JobFolder(folder).events).events if event.type == "step"]
    assert steps == list(range(1, 41))
    store.close()


def test_an_adopted_child_can_be_cancelled_and_one_that_died_unseen_is_settled(
    store: JobStore, config: ProviderConfig, root: Path
) -> None:
    config = tiny_config(root, max_concurrent_jobs=2)
    executor = LocalExecutor(config)
    folders = [new_job(store, config, name, grandchild=True, **LONG) for name in ("cancelled", "died")]
    new_supervisor(store, config, executor).step()  # and no more is seen of it
    pids = [started(folder) for folder in folders]
    wait_for((folders[1] / "grandchild").exists)
    os.kill(pids[1], signal.SIGKILL)
    wait_for(lambda: birth(pids[1]) is None)
    store.request_cancel("cancelled", None)
    (folders[1] / "child.json").write_text("{}")
    first_starts = store.running()
    run_until_idle(new_supervisor(store, config))
    cancelled, died = store.get("cancelled", None), store.get("died", None)
    assert (cancelled.state, len(cancelled.artifacts)) == (JobState.CANCELLED, 1)
    assert (died.state, died.attempts, died.lost) == (JobState.COMPLETED, 2, 1), "tried again"
    for folder in folders:
        orphan = int((folder / "grandchild").read_text())
        wait_for(lambda orphan=orphan: birth(orphan) is None)  # type: ignore[misc]
    for job in first_starts:
        reap(job, executor)


def test_a_supervisor_asked_to_leave_frees_the_lease_and_leaves_its_children(
    config: ProviderConfig, supervisor_process: Callable[[], BaseProcess]
) -> None:
    process = supervisor_process()
    store = JobStore(config.url)
    folder = new_job(store, config, "job", **LONG)
    pid = started(folder)
    process.terminate()
    process.join(120)
    assert process.exitcode == 0
    assert store.live_supervisor() is None
    job = store.get("job", None)
    assert (job.state, job.pid) == (JobState.IN_PROGRESS, pid)
    assert job.pid_birth is not None
    assert is_alive(pid, job.pid_birth)
    os.kill(pid, signal.SIGKILL)
    store.close()


def test_of_two_supervisors_the_second_ends_and_a_dead_ones_lease_is_taken_at_once(
    root: Path, supervisor_process: Callable[..., BaseProcess]
) -> None:
    config = tiny_config(root, lease_s=100)
    first = supervisor_process(config)
    store = JobStore(config.url)
    wait_for(store.live_supervisor)
    store.close()
    second = supervisor_process(config)
    second.join(120)
    assert second.exitcode == 0
    assert first.is_alive()
    first.kill()
    first.join()
    third = supervisor_process(config)
    store = JobStore(config.url)
    began = time.monotonic()
    wait_for(lambda: (live := store.live_supervisor()) is not None and live.pid == third.pid)
    assert time.monotonic() - began < config.supervisor.lease_s, "without waiting for the lease to run out"
    store.close()


def test_a_supervisor_that_lost_its_lease_leaves_without_touching_anything(
    store: JobStore, config: ProviderConfig
) -> None:
    executor = LocalExecutor(config)
    supervisor = Supervisor(store, config, executor)
    assert supervisor.acquire()
    folder = new_job(store, config, "job", **LONG)
    supervisor.step()
    pid = started(folder)
    store.release_lease(supervisor.id, only_if_idle=False)
    assert store.acquire_lease("another", 1, 60)
    assert supervisor.run()
    live = store.live_supervisor()
    assert live is not None
    assert live.id == "another"
    job = store.get("job", None)
    assert job.state is JobState.IN_PROGRESS
    assert birth(pid) is not None
    os.kill(pid, signal.SIGKILL)
    reap(job, executor)


def test_an_idle_supervisor_asks_for_nothing_until_somebody_writes(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not supervisor.step()
    looks: list[str] = []
    for name in ("running", "asking_for_more", "claim"):
        query = getattr(store, name)
        monkeypatch.setattr(store, name, lambda *a, query=query, name=name: (looks.append(name), query(*a))[1])
    for _ in range(5):
        assert not supervisor.step()
    assert looks == []
    server = JobStore(config.url)
    new_job(server, config, "job")
    assert supervisor.step()
    assert looks == ["running", "asking_for_more", "claim"]
    server.close()
    assert ended(store, supervisor, "job").state is JobState.COMPLETED


def test_a_store_that_fails_for_a_moment_ends_nothing(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(root, idle_exit_s=0)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    new_job(store, config, "job")
    failures = iter([OSError("disk is full")] * 3)
    running = store.running

    def failing() -> list[Job]:
        for failure in failures:
            raise failure
        return running()

    monkeypatch.setattr(store, "running", failing)
    assert supervisor.run()
    assert store.get("job", None).state is JobState.COMPLETED


# Started by a server.


def zombies() -> list[int]:
    """Children of this process that have ended but were not reaped."""
    mine = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) == os.getpid():
            mine.append(int(stat.parent.name))
    return mine


def test_servers_start_one_supervisor_which_leaves_when_idle_and_is_started_again(root: Path) -> None:
    config = tiny_config(root, idle_exit_s=0.2, poll_s=0.1)
    stores = [JobStore(config.url) for _ in range(4)]
    folder = new_job(stores[0], config, "first", steps=20, step_s=0.1)
    begun: list[bool] = []
    servers = [
        threading.Thread(target=lambda store=store: begun.append(ensure_supervisor(config, store)))  # type: ignore[misc]
        for store in stores
    ]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    assert sorted(begun) == [False, False, False, True]
    started(folder)
    live = stores[0].live_supervisor()
    assert live is not None
    assert os.getsid(live.pid) == live.pid, "detached"
    assert "torch" not in Path(f"/proc/{live.pid}/maps").read_text()
    assert not ensure_supervisor(config, stores[1])
    assert wait_until_ended(stores[0], "first").state is JobState.COMPLETED
    wait_for(lambda: stores[0].live_supervisor() is None)
    new_job(stores[2], config, "second")
    assert ensure_supervisor(config, stores[2])
    assert wait_until_ended(stores[3], "second").state is JobState.COMPLETED
    wait_for(lambda: not any(thread.name == "moe-supervisor" for thread in threading.enumerate()))
    assert zombies() == []
    log = (root / "supervisor.log").read_text()
    assert log.count("supervisor of ") == 2
    assert "ERROR" not in log
    for store in stores:
        store.close()


def test_a_server_told_not_to_starts_none(store: JobStore, root: Path) -> None:
    config = tiny_config(root, start=False)
    new_job(store, config, "job")
    assert not ensure_supervisor(config, store)


def test_a_killed_supervisor_is_replaced_though_nobody_asks_for_anything(root: Path) -> None:
    config = tiny_config(root, lease_s=2, idle_exit_s=0.2, poll_s=0.1)
    store = JobStore(config.url)
    server = SupervisorKeeper(config, store)
    server.start()
    folder = new_job(store, config, "job", steps=100, step_s=0.1)
    started(folder)
    first = store.live_supervisor()
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    assert wait_until_ended(store, "job").state is JobState.COMPLETED
    job = store.get("job", None)
    assert (job.attempts, job.lost) == (1, 0), "its process went on"
    wait_for(lambda: store.live_supervisor() is None)
    server.close()
    assert (root / "supervisor.log").read_text().count("supervisor of ") == 2
    store.close()


def test_a_supervisor_keeper_starts_nothing_without_work_or_where_it_must_not_and_outlives_a_broken_store(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(root, lease_s=2, idle_exit_s=0.2)
    store = JobStore(config.url)
    new_job(store, config, "ended")
    assert store.request_cancel("ended", None).state is JobState.CANCELLED
    server, forbidden = SupervisorKeeper(config, store), SupervisorKeeper(tiny_config(root, start=False), store)
    server.start()
    forbidden.start()
    with sqlite3.connect(root / "jobs.db") as database:
        database.execute("alter table moe_jobs rename to away")
        database.commit()
        wait_for(lambda: "could not be read: (sqlite3.OperationalError) no such table" in caplog.text)
        database.execute("alter table away rename to moe_jobs")
    database.close()
    assert not (root / "supervisor.log").exists()
    new_job(store, config, "job")
    forbidden.close()
    assert wait_until_ended(store, "job").state is JobState.COMPLETED
    wait_for(lambda: store.live_supervisor() is None)
    server.close()
    store.close()
