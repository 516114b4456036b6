"""Laws for jobs whose process is lost, killed by the OOM killer, or silent: they are tried again or say why not."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor
from llama_stack_provider_moe.control.supervisor.oom import MemoryKills
from llama_stack_provider_moe.control.supervisor.processes import birth
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.control.supervisor.watchdog import Watchdog
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import LONG, ended, new_job, new_supervisor, started, tiny_config, wait_for


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig) -> Supervisor:
    return new_supervisor(store, config)


def wait_until_settled(store: JobStore, supervisor: Supervisor, job_id: str) -> Job:
    wait_for(lambda: not supervisor.step() and store.get(job_id, None).state.ended)
    return store.get(job_id, None)


def test_a_lost_job_is_tried_again_and_completes(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job", killed=2)
    reasons = set()

    def idle() -> bool:
        running = supervisor.step()
        reasons.add(store.get("job", None).reason)
        return not running

    wait_for(idle)
    job = store.get("job", None)
    assert (job.state, job.attempts, job.lost, job.reason) == (JobState.COMPLETED, 3, 2, None)
    assert len((folder / "launches").read_text().split()) == 3
    for number in (1, 2):
        told = f"was killed by SIGKILL ({number} of at most 3 starts lost; it is tried again); last output: hello"
        assert any(told in str(reason) for reason in reasons), reasons


@pytest.mark.parametrize("max_attempts", [1, 2])
def test_a_job_that_is_lost_again_and_again_fails_by_the_signals_name(
    store: JobStore, root: Path, max_attempts: int
) -> None:
    config = tiny_config(root, max_attempts=max_attempts)
    new_job(store, config, "job", killed=9)
    job = ended(store, new_supervisor(store, config), "job")
    assert (job.state, job.attempts, job.lost) == (JobState.FAILED, max_attempts, max_attempts)
    assert [artifact.kind for artifact in job.artifacts] == ["checkpoint"]
    assert job.reason is not None
    told = f"was killed by SIGKILL ({max_attempts} of at most {max_attempts} starts lost); last output: hello"
    assert job.reason.startswith(f"the training process {told}")


def test_a_resumed_job_is_tried_as_often_as_a_new_one_and_forgets_how_it_had_failed(
    store: JobStore, root: Path
) -> None:
    config = tiny_config(root, max_attempts=2)
    supervisor = new_supervisor(store, config)
    folder = new_job(store, config, "job", end="failed")
    assert ended(store, supervisor, "job").reason == "the rows of this job are too strange"
    (folder / "child.json").write_text(json.dumps({"killed": 2}))
    store.resume("job", None)
    job = ended(store, supervisor, "job")
    assert (job.state, job.attempts, job.lost, job.reason) == (JobState.COMPLETED, 3, 1, None)


def test_a_job_whose_kernel_failed_is_started_again_and_not_counted_as_lost(store: JobStore, root: Path) -> None:
    config = tiny_config(root, max_attempts=1)
    supervisor = new_supervisor(store, config)
    new_job(store, config, "job", handed_over=1)
    reasons = set()

    def idle() -> bool:
        running = supervisor.step()
        reasons.add(store.get("job", None).reason)
        return not running

    wait_for(idle)
    job = store.get("job", None)
    assert (job.state, job.attempts, job.lost, job.reason) == (JobState.COMPLETED, 2, 0, None)
    assert "a kernel failed after step 1; the next start computes the experts with torch" in reasons


def test_a_job_stopped_by_somebody_else_is_tried_again(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    """A machine that shuts down sends SIGTERM to all processes; nobody cancelled the job."""
    folder = new_job(store, config, "job", **LONG)
    supervisor.step()
    os.kill(started(folder), signal.SIGTERM)
    (folder / "child.json").write_text("{}")
    job = ended(store, supervisor, "job")
    assert (job.state, job.attempts, job.lost) == (JobState.COMPLETED, 2, 1)


def test_a_lost_job_that_was_to_be_cancelled_is_cancelled(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even if the request comes between the check of the process and the write to the store."""
    folder = new_job(store, config, "job", killed=9)
    requeue = store.requeue

    def late(*arguments: Any) -> Job:
        store.request_cancel("job", None)
        return requeue(*arguments)

    monkeypatch.setattr(store, "requeue", late)
    supervisor.step()
    job = wait_until_settled(store, supervisor, "job")
    assert (job.state, job.attempts) == (JobState.CANCELLED, 1)
    assert len((folder / "launches").read_text().split()) == 1


@pytest.mark.parametrize("seen_by", ["group", "machine", "nobody"])
def test_out_of_memory_is_told_from_another_kill_and_not_tried_again(
    store: JobStore, config: ProviderConfig, root: Path, seen_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = root / "system"
    group = system / "sys/fs/cgroup/jobs.slice/memory.events"
    machine = system / "proc/vmstat"
    for path, text in ((group, "low 0\noom 1\noom_kill 1\n"), (machine, "nr_free_pages 7\noom_kill 5\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    if seen_by == "group":  # the job's own, whatever its pid will be
        (system / "proc/0").mkdir()
        (system / "proc/0/cgroup").write_text("0::/jobs.slice\n")
        monkeypatch.setattr(
            "llama_stack_provider_moe.control.supervisor.executors.local.MemoryKills",
            lambda _, system: MemoryKills(0, system),
        )
    supervisor = new_supervisor(store, config, LocalExecutor(config, system=system))
    folder = new_job(store, config, "job", **LONG)
    supervisor.step()
    pid = started(folder)
    supervisor.step()
    if seen_by == "group":
        group.write_text("low 0\noom 2\noom_kill 2\n")
    elif seen_by == "machine":
        machine.write_text("nr_free_pages 7\noom_kill 6\n")
    os.kill(pid, signal.SIGKILL)
    (folder / "child.json").write_text("{}")
    job = ended(store, supervisor, "job")
    if seen_by == "nobody":
        assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    else:
        assert (job.state, job.attempts) == (JobState.FAILED, 1)
        assert str(job.reason).startswith("the training process was killed by the kernel: out of memory")
        assert "`training.batch_size`" in str(job.reason)


def test_a_job_that_gives_no_sign_of_life_is_stopped_and_fails(store: JobStore, root: Path) -> None:
    config = tiny_config(root, stall_s=0.5, cancel_grace_s=0.2)
    supervisor = new_supervisor(store, config)
    folder = new_job(store, config, "stuck", steps=1, step_s=1000)
    supervisor.step()
    pid = started(folder)
    job = ended(store, supervisor, "stuck")
    assert (job.state, job.attempts, job.lost) == (JobState.FAILED, 1, 0)
    assert job.reason == "no sign of life for 0.00833 minutes (`supervisor.stall_s`); it stalled and was stopped"
    assert birth(pid) is None


@pytest.mark.parametrize("sign", ["events.jsonl", "output.log"])
def test_silence_is_counted_from_the_last_byte_and_not_while_nobody_looks(
    root: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    clock = 1000.0
    monkeypatch.setattr("llama_stack_provider_moe.control.supervisor.watchdog.time.monotonic", lambda: clock)
    watchdog, folder = Watchdog(), JobFolder(root)
    assert watchdog.silent_s("job", folder) == 0
    (root / sign).write_text("x")
    for seconds, silent in ((10, 0), (10, 10), (50, 60), (100_000, 180)):
        clock += seconds
        assert watchdog.silent_s("job", folder) == silent
    with (root / sign).open("a") as file:
        file.write("x")
    assert watchdog.silent_s("job", folder) == 0
    clock += 7
    assert watchdog.silent_s("job", folder) == 7
    watchdog.forget("job")
    assert watchdog.silent_s("job", folder) == 0
