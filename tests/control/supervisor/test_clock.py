"""If somebody sets the clock by hours, in either direction, no supervisor loses its lease and no job its process."""

import os
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor, supervise
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import (
    FORK,
    LONG,
    new_job,
    new_supervisor,
    started,
    tiny_config,
    wait_for,
    wait_until_ended,
)


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig) -> Supervisor:
    return new_supervisor(store, config)


@pytest.mark.parametrize("hours", [6, -6])
def test_a_clock_that_jumps_costs_no_supervisor_its_lease_and_no_job_its_process(
    root: Path, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_s = FORK.Value("d", 0.0)
    monkeypatch.setattr(
        "llama_stack_provider_moe.control.store.lease.now", lambda: datetime.now(UTC) + timedelta(seconds=shift_s.value)
    )
    config = tiny_config(root, lease_s=9)

    def start() -> BaseProcess:
        process = FORK.Process(target=supervise, args=(config,))
        process.start()
        return process

    first = start()
    store = JobStore(config.url)
    folder = new_job(store, config, "job", **LONG)
    pid = started(folder)
    store.close()
    shift_s.value = hours * 3600.0
    second = start()  # as a server does that finds the lease run out
    second.join(120)
    assert (second.exitcode, first.is_alive()) == (0, True)
    store = JobStore(config.url)
    live, job = store.live_supervisor(), store.get("job", None)
    assert live is not None
    assert live.pid == first.pid
    assert (job.state, job.pid, job.attempts, job.lost) == (JobState.IN_PROGRESS, pid, 1, 0)
    store.request_cancel("job", None)
    assert wait_until_ended(store, "job").state is JobState.CANCELLED
    assert (folder / "launches").read_text().split() == [str(pid)]
    store.close()
    first.terminate()
    first.join()


def test_a_supervisor_that_hangs_loses_its_lease_all_the_same(store: JobStore, root: Path) -> None:
    config = tiny_config(root, lease_s=2)
    elsewhere = ProcessName(PidScope("another-host", "boot", "namespace"), 1, 2.0)  # nobody here knows of its end
    assert store.acquire_lease(str(elsewhere), 1, 0.1)
    wait_for(lambda: store.live_supervisor() is None)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    live = store.live_supervisor()
    assert live is not None
    assert live.id == supervisor.id


def test_a_job_on_another_machine_is_not_judged_by_its_clock(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job")
    store.claim(str(ProcessName(PidScope("another-host", "boot", "namespace"), 1, 2.0)))
    store.launched("job", 1, 2.0)
    (folder / "output.log").write_text("alive\n")
    for written in (0.0, time.time() + 1e6):
        os.utime(folder / "output.log", (written, written))
        supervisor.step()
        assert store.get("job", None).state is JobState.IN_PROGRESS


def test_a_clock_that_was_set_forward_deletes_no_job_for_its_age(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(root, retention_days=30, idle_exit_s=0)
    folder = new_job(store, config, "young")
    store.request_cancel("young", None)
    watching = new_supervisor(store, config)
    later = timedelta(days=365)
    with monkeypatch.context() as jump:
        jump.setattr("llama_stack_provider_moe.control.supervisor.removal.now", lambda: datetime.now(UTC) + later)
        wall = time.time
        jump.setattr(
            "llama_stack_provider_moe.control.supervisor.watchdog.time.time", lambda: wall() + later.total_seconds()
        )
        assert watching.acquire()
        assert watching.run()
        assert folder.is_dir()
        fresh = Supervisor(store, config)
        assert fresh.acquire()
        assert fresh.run()
        assert not folder.exists(), "one that saw no jump takes the clock at its word"
