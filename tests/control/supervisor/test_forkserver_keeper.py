"""Laws for the forkserver's life: without one, jobs start cold, and one that died is replaced after a delay."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors import forkserver_keeper, local
from llama_stack_provider_moe.control.supervisor.executors.forkserver import Forkserver, Readiness
from llama_stack_provider_moe.control.supervisor.executors.forkserver_keeper import ForkserverKeeper
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.control.supervisor.test_forkserver import ForkingExecutor, parent_of
from tests.support.jobs_support import LONG, ended, new_job, started, tiny_config, wait_for


@pytest.fixture
def config(root: Path) -> ProviderConfig:
    return tiny_config(root, max_attempts=1)


@pytest.fixture
def forking(store: JobStore, config: ProviderConfig) -> Iterator[Callable[[str], tuple[Supervisor, ForkingExecutor]]]:
    """Create a supervisor that holds the lease, with an executor whose forkservers behave as given."""
    made: list[ForkingExecutor] = []

    def make(does: str = "") -> tuple[Supervisor, ForkingExecutor]:
        executor = ForkingExecutor(config, does=does)
        made.append(executor)
        supervisor = Supervisor(store, config, executor)
        assert supervisor.acquire()
        return supervisor, executor

    yield make
    for executor in made:
        for forkserver in executor.forkservers:
            forkserver.close("the test is over")


Make = Callable[..., tuple[Supervisor, ForkingExecutor]]


def completed(store: JobStore, supervisor: Supervisor, job_id: str) -> Job:
    job = ended(store, supervisor, job_id)
    assert job.state is JobState.COMPLETED, job.reason
    return job


def test_one_that_is_killed_is_replaced_and_jobs_start_cold_meanwhile(
    store: JobStore,
    config: ProviderConfig,
    forking: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, forkserver_keeper.log.name)
    supervisor, executor = forking()
    new_job(store, config, "first")
    completed(store, supervisor, "first")
    assert executor.forkserver is not None
    monkeypatch.setattr(forkserver_keeper, "FIRST_WAIT_S", 3600.0)
    monkeypatch.setattr(forkserver_keeper, "LONGEST_WAIT_S", 3600.0)
    killed = executor.pid
    os.kill(killed, signal.SIGKILL)

    folder = new_job(store, config, "cold", **LONG)
    wait_for(lambda: supervisor.step() and store.get("cold", None).pid)
    assert parent_of(started(folder)) == os.getpid(), "it was started cold, by this process"
    store.request_cancel("cold", None)
    ended(store, supervisor, "cold")
    assert len(executor.forkservers) == 1
    assert 3500 < executor.forkserver.wait_s() <= 3600

    executor.forkserver._due_s = 0.0  # the hour is over
    new_job(store, config, "again")  # has it started
    completed(store, supervisor, "again")
    wait_for(lambda: executor.forkserver is not None and executor.forkserver.readiness() is Readiness.READY)
    assert executor.pid != killed
    folder = new_job(store, config, "warm", **LONG)
    wait_for(lambda: supervisor.step() and store.get("warm", None).pid)
    assert parent_of(started(folder)) == executor.pid
    store.request_cancel("warm", None)
    ended(store, supervisor, "warm")
    assert len(executor.forkservers) == 2
    assert "killed by SIGKILL" in caplog.text
    assert "the next start, after 1 failure(s), is in 3600 s" in caplog.text
    assert "job cold: starts cold" in caplog.text


def test_one_that_dies_at_each_start_is_started_more_and_more_seldom(
    store: JobStore, config: ProviderConfig, forking: Make, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(forkserver_keeper, "LONGEST_WAIT_S", 30.0)
    supervisor, executor = forking("exit")
    server = executor.forkserver
    assert server is not None
    for number in range(1, 5):
        server._due_s = 0.0
        new_job(store, config, f"job-{number}")
        completed(store, supervisor, f"job-{number}")
        wait_for(lambda: server.maintain() or server.current is None)
        assert (server.failures, len(executor.forkservers)) == (number, number)
    # Doubled each time, up to the longest. What is left of each wait depends on how busy the machine is.
    for number, wait_s in enumerate((5, 10, 20, 30), 1):
        assert f"the next start, after {number} failure(s), is in {wait_s} s" in caplog.text
    new_job(store, config, "between")
    completed(store, supervisor, "between")
    assert len(executor.forkservers) == 4, "none is started before its time"


def test_one_that_served_long_begins_with_the_shortest_wait(
    monkeypatch: pytest.MonkeyPatch, config: ProviderConfig
) -> None:
    executor = ForkingExecutor(config)
    server = executor.forkserver
    assert server is not None
    wait_for(lambda: server.readiness() is Readiness.READY)
    server.failures, server._ready_s = 5, -forkserver_keeper.LONGEST_WAIT_S
    executor.forkservers[0].close("killed")
    server.maintain()
    assert server.failures == 1
    assert server.wait_s() <= forkserver_keeper.FIRST_WAIT_S


def test_one_that_cannot_be_started_at_all_stops_no_job(
    store: JobStore, config: ProviderConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> Forkserver:
        raise FileNotFoundError(2, "No such file or directory", "/no/python")

    supervisor = Supervisor(store, config, local.LocalExecutor(config, start_forkserver=start))
    assert supervisor.acquire()
    new_job(store, config, "job")
    completed(store, supervisor, "job")
    assert "/no/python" in caplog.text


@pytest.mark.parametrize(
    ("does", "said"),
    [("thread", "jemalloc_bg_thd"), ("damage", "a message that can't be read")],
)
def test_one_that_runs_a_thread_or_talks_nonsense_is_given_up(
    store: JobStore, config: ProviderConfig, forking: Make, caplog: pytest.LogCaptureFixture, does: str, said: str
) -> None:
    """This includes native threads, which Python does not list: a fork could hang."""
    supervisor, executor = forking(does)
    folder = new_job(store, config, "job", **LONG)
    wait_for(lambda: supervisor.step() and store.get("job", None).pid)
    assert parent_of(started(folder)) == os.getpid(), "started cold"
    store.request_cancel("job", None)
    assert ended(store, supervisor, "job").state is JobState.CANCELLED
    assert said in caplog.text
    assert executor.forkservers[0].readiness() is Readiness.GONE


def test_messages_of_a_later_version_are_read_as_far_as_they_are_known(
    store: JobStore, config: ProviderConfig, forking: Make
) -> None:
    supervisor, executor = forking("news")
    folder = new_job(store, config, "job", **LONG)
    wait_for(lambda: supervisor.step() and store.get("job", None).pid)
    assert parent_of(started(folder)) == executor.pid
    store.request_cancel("job", None)
    assert ended(store, supervisor, "job").state is JobState.CANCELLED


def test_a_job_ends_though_its_forkserver_hangs(
    store: JobStore, config: ProviderConfig, forking: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would never reap its child or report how the child ended."""
    monkeypatch.setattr(local, "ANSWER_LIMIT_S", 0.5)
    supervisor, executor = forking()
    folder = new_job(store, config, "job", **LONG)
    wait_for(lambda: supervisor.step() and store.get("job", None).pid)
    pid = started(folder)
    os.kill(executor.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert ended(store, supervisor, "job").state is JobState.FAILED
    assert executor.forkservers[0].readiness() is Readiness.GONE


def test_nothing_is_started_before_the_first_job(config: ProviderConfig) -> None:
    executor = ForkingExecutor(config)
    assert isinstance(executor.forkserver, ForkserverKeeper)
    executor.forkserver.maintain()
    assert not executor.forkservers


def test_one_that_is_killed_with_a_request_unread_says_how_it_ended(config: ProviderConfig) -> None:
    """Its socket then gives ECONNRESET instead of an end of file, which says nothing to a person."""
    forking = ForkingExecutor(config)
    assert forking.forkserver is not None
    wait_for(lambda: forking.forkserver.readiness() is Readiness.READY)
    process = psutil.Process(forking.pid)
    process.suspend()
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
    forkserver = forking.forkservers[0]
    forkserver._socket.send(b'{"folder": "unread"}')
    process.kill()
    wait_for(lambda: forkserver.readiness() is Readiness.GONE)
    assert forkserver.end_reason == "it ended (killed by SIGKILL; Connection reset by peer)"
