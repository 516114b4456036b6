"""Shared by the tests of jobs and supervisors."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors import Child, Executor
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor
from llama_stack_provider_moe.control.supervisor.processes import with_environment
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.server_config import ProviderConfig

# Importing SQLAlchemy and pytest costs seconds of CPU, a fork nothing; the test that forks has no open store.
FORK = multiprocessing.get_context("fork")
LONG = {"steps": 1000, "step_s": 0.05}
TINY_CHILD = Path(__file__).with_name("tiny_child.py")


@contextmanager
def ram_folder() -> Iterator[Path]:
    """A folder in memory if the system has one: the store syncs every write, and disks may be busy."""
    ram = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="moe-test-", dir=ram if ram.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def job_folders() -> Iterator[Path]:
    """The same for tests that run jobs: it kills what a failed test leaves running."""
    with ram_folder() as folder:
        try:
            yield folder
        finally:
            kill_children(folder / "jobs")


def kill_children(jobs: Path) -> None:
    """Kill the processes of the jobs whose folders are in `jobs`."""
    for job in jobs.glob("*"):
        for pid in with_environment("MOE_JOB_FOLDER", str(job)):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def small_disk(folder: Path, megabytes: int = 8) -> Iterator[None]:
    """Mount a small file system at `folder`; skips the test if this process may not mount one."""
    program = shutil.which("mount")
    if program is None:
        pytest.skip("there is no program `mount`")
    options = f"size={megabytes}m,mode=0700"
    done = subprocess.run([program, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here (only root may): {done.stderr.strip()}")
    try:
        yield
    finally:
        kill_children(folder / "jobs")
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Fill the file system of `folder`; returns the file that fills it."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    return ballast


def tiny_interpreter(folder: Path) -> str:
    """A `training_python` that runs `tiny_child.py` instead of the given training module."""
    script = folder / "python"
    # `$0 -m llama_stack_provider_moe.compute.worker.main FOLDER`; -S skips site-packages, which take long to list
    script.write_text(f'#!/bin/sh\ntest "$2" = llama_stack_provider_moe.compute.worker.main || exit 99\n'
                      f'exec "{sys.executable}" -S "{TINY_CHILD}" "$3"\n')  # fmt: skip
    script.chmod(0o755)
    return str(script)


def tiny_config(folder: Path, **supervisor: Any) -> ProviderConfig:
    """A provider on `folder` whose training processes are tiny children."""
    times = {"poll_s": 0.02, "lease_s": 5, "idle_exit_s": 60, "cancel_grace_s": 30, "warm": False}
    return ProviderConfig.model_validate(
        {"state_dir": folder, "training_python": tiny_interpreter(folder), "supervisor": times | supervisor}
    )


def new_job(store: JobStore, config: ProviderConfig, job_id: str, gpus: int | None = None, **plan: Any) -> Path:
    """Submit a job whose child follows `plan`; returns its folder."""
    folder = config.jobs_dir / job_id
    folder.mkdir(parents=True)
    (folder / "child.json").write_text(json.dumps(plan))
    store.submit(job_id, "ann", "sft", "some/model", str(folder), gpus)
    return folder


def submit(store: JobStore, job_id: str, owner: str = "ann", gpus: int | None = None) -> Job:
    """Submit a job that never runs."""
    return store.submit(job_id, owner, "sft", "some/model", f"/jobs/{job_id}", gpus)


def wait_for[T](what: Callable[[], T], timeout_s: float = 300) -> T:
    """Wait for the first true result of `what`, and return it.

    The longer it has waited, the less often it looks (every 10 to 50 ms), because each look takes processor time from
    what it waits for. The limit is only for what never happens: it is no measure of how fast something is.
    """
    began = time.monotonic()
    while not (answer := what()):
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, f"it did not happen within {timeout_s:g} s"
        time.sleep(min(max(0.01, waited_s / 40), 0.05))
    return answer


def new_supervisor(store: JobStore, config: ProviderConfig, executor: Executor | None = None) -> Supervisor:
    """A supervisor in this process that has the lease; to the store, all supervisors of this process are the same."""
    supervisor = Supervisor(store, config, executor)
    assert supervisor.acquire()
    return supervisor


def run_until_idle(supervisor: Supervisor) -> None:
    """Let a supervisor of this process work until no job is in progress."""
    assert supervisor.acquire()
    wait_for(lambda: not supervisor.step())


def ended(store: JobStore, supervisor: Supervisor, job_id: str) -> Job:
    """The job, when a supervisor of this process has nothing more to do."""
    run_until_idle(supervisor)
    return store.get(job_id, None)


def started(folder: Path) -> int:
    """Pid of a job's child, when it has started."""
    wait_for(lambda: read(JobFolder(folder).events).events)
    return int((folder / "launches").read_text().split()[-1])


def reap(job: Job, executor: LocalExecutor) -> None:
    """Collect a dead child of this process with what started it."""
    assert job.pid is not None
    assert job.pid_birth is not None
    child = Child(Path(job.folder), job.pid, job.pid_birth)
    wait_for(lambda: executor.poll(child))


def wait_until_ended(store: JobStore, job_id: str, timeout_s: float = 120) -> Job:
    """The job, when another process has ended it."""

    def ended() -> Job | None:
        job = store.get(job_id, None)
        return job if job.state.ended else None

    job = wait_for(ended, timeout_s)
    assert job is not None
    return job
