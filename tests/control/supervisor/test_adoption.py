"""The law of an upgrade: a supervisor adopts running jobs by pid, time of birth and folder, never by module name.

After commit b628b91 the entry points of training processes were renamed: `training.main` to `compute.worker.main`, and
`training.nursery`, which forks them, to `compute.worker.forkserver`. Processes that an older version started keep the
old names in their command lines for as long as they live.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_stack_provider_moe
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName, birth, is_alive
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_VARIABLE, JOB_VARIABLE, Attempt
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import (
    LONG,
    TINY_CHILD,
    ended,
    new_job,
    new_supervisor,
    started,
    tiny_config,
    wait_for,
)

COLD, FORKED = "llama_stack_provider_moe.training.main", "llama_stack_provider_moe.training.nursery"
# Stand-ins for the old modules; a process list can't tell the difference.
OLD_MODULES = {
    COLD: f"import runpy\nrunpy.run_path({str(TINY_CHILD)!r}, run_name='__main__')\n",
    FORKED: f"""
import os, runpy, signal
pid = os.fork()
if pid == 0:
    os.setsid()
    os.dup2(2, 1)
    runpy.run_path({str(TINY_CHILD)!r}, run_name="__main__")
print(pid, flush=True)
signal.pause()
""",
}

StartOld = Callable[..., Job]


@pytest.fixture
def old_package(root: Path) -> Path:
    """A folder for PYTHONPATH in which the old modules exist."""
    package = root / "old" / "llama_stack_provider_moe"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "training" / "__init__.py").touch()
    for name, source in OLD_MODULES.items():
        (package / "training" / f"{name.rpartition('.')[2]}.py").write_text(source)
    return package.parent


@pytest.fixture(params=[COLD, FORKED])
def start_old(
    request: pytest.FixtureRequest, store: JobStore, config: ProviderConfig, old_package: Path
) -> Iterator[StartOld]:
    """Start a job as an older supervisor did before it left; once cold, once forked."""
    processes = []

    def start(**plan: Any) -> Job:
        folder = JobFolder(new_job(store, config, "job", **plan))
        dead = subprocess.Popen(["true"])
        dead.wait()
        claimed = store.claim(str(ProcessName(PidScope.here(), dead.pid, 1.0)))
        assert claimed is not None
        write_atomic(folder.attempt, Attempt(number=claimed.attempts, name=claimed.attempt))
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(old_package),
            JOB_VARIABLE: str(folder.root), ATTEMPT_VARIABLE: claimed.attempt,
        }  # fmt: skip
        with folder.output.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", request.param, str(folder.root)], cwd=folder.root, env=environment,
                stdout=subprocess.PIPE if request.param == FORKED else output, stderr=output, start_new_session=True,
            )  # fmt: skip
        processes.append(process)
        pid = process.pid
        if process.stdout is not None:
            with process.stdout as output:
                pid = int(output.readline())
        started(folder.root)
        if request.param == FORKED:  # the forkserver ends with its supervisor; its children do not
            process.kill()
            process.wait()
        born = birth(pid)
        assert born is not None
        assert request.param in Path(f"/proc/{pid}/cmdline").read_text().split("\0"), (
            "the old module name must be in the command line"
        )
        return store.launched("job", pid, born)

    yield start
    for process in processes:
        process.kill()
        process.wait()


def launches(job: Job) -> int:
    """How many processes have begun the job."""
    return len((Path(job.folder) / "launches").read_text().splitlines())


def test_it_is_adopted_and_its_end_is_recorded(store: JobStore, config: ProviderConfig, start_old: StartOld) -> None:
    job = start_old(steps=20, step_s=0.05)
    supervisor = new_supervisor(store, config)
    assert supervisor.step()
    adopted = store.get("job", None)
    assert (adopted.state, adopted.pid, adopted.attempts) == (JobState.IN_PROGRESS, job.pid, 1)
    end = ended(store, supervisor, "job")
    assert (end.state, end.attempts, end.lost, end.reason) == (JobState.COMPLETED, 1, 0, None)
    assert [each.kind for each in end.artifacts] == ["adapter"]
    assert launches(job) == 1


def test_a_cancel_reaches_it(store: JobStore, config: ProviderConfig, start_old: StartOld) -> None:
    job = start_old(**LONG)
    supervisor = new_supervisor(store, config)
    assert supervisor.step()
    store.request_cancel("job", None)
    end = ended(store, supervisor, "job")
    assert end.state is JobState.CANCELLED
    assert [each.kind for each in end.artifacts] == ["checkpoint"]
    assert job.pid is not None
    assert job.pid_birth is not None
    assert not is_alive(job.pid, job.pid_birth)


def test_the_watchdog_stops_it_when_it_is_silent(store: JobStore, root: Path, start_old: StartOld) -> None:
    start_old(steps=1, step_s=1000)
    supervisor = new_supervisor(store, tiny_config(root, stall_s=0.5, cancel_grace_s=0.1))
    end = ended(store, supervisor, "job")
    assert end.state is JobState.FAILED
    assert "no sign of life" in str(end.reason)


def test_a_lost_one_is_tried_again_by_todays_entry(
    store: JobStore, config: ProviderConfig, start_old: StartOld
) -> None:
    job = start_old(steps=60, step_s=0.05)
    supervisor = new_supervisor(store, config)
    assert supervisor.step()
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    wait_for(lambda: birth(job.pid or 0) is None)
    end = ended(store, supervisor, "job")
    assert (end.state, end.attempts, end.lost) == (JobState.COMPLETED, 2, 1)
    assert launches(job) == 2


def test_no_code_reads_a_command_line() -> None:
    package = Path(llama_stack_provider_moe.__file__).parent
    assert [str(path) for path in package.rglob("*.py") if "cmdline" in path.read_text(encoding="utf-8")] == []
