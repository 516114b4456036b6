"""Laws of the forkserver: a forked training process differs from a cold start only in the time it takes."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors import Child, Exit
from llama_stack_provider_moe.control.supervisor.executors.forkserver import Forkserver, Readiness
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor, training_environment
from llama_stack_provider_moe.control.supervisor.processes import is_alive
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_VARIABLE
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import LONG, ended, new_job, new_supervisor, started, tiny_config, wait_for
from tests.support.tiny_forkserver import DOES, WAITS_FOR

ROOT = str(Path(__file__).parents[3])
OF_A_SHELL = {"PWD", "OLDPWD", "SHLVL", "_"}


@pytest.fixture
def config(root: Path) -> ProviderConfig:
    return tiny_config(root, max_attempts=1)


class ForkingExecutor(LocalExecutor):
    """An executor with a forkserver of tiny children; each forkserver that it starts is kept in `forkservers`."""

    def __init__(self, config: ProviderConfig, waits_for: Path | None = None, does: str = "") -> None:
        self.forkservers: list[Forkserver] = []
        self.does = does  # what goes wrong with each that is started from now on, see `tiny_forkserver`
        own = config.model_copy(update={"training_python": sys.executable})

        def start() -> Forkserver:
            environment = training_environment(os.environ, config) | {"PYTHONPATH": ROOT, DOES: self.does}
            if waits_for is not None:
                environment[WAITS_FOR] = str(waits_for)
            self.forkservers.append(Forkserver(own, environment, "tests.support.tiny_forkserver"))
            return self.forkservers[-1]

        super().__init__(config, start_forkserver=start)

    @property
    def pid(self) -> int:
        """Pid of the forkserver."""
        return self.forkservers[-1]._process.pid


@pytest.fixture
def executor(config: ProviderConfig) -> Iterator[ForkingExecutor]:
    executor = ForkingExecutor(config)
    yield executor
    for forkserver in executor.forkservers:
        forkserver.close()


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig, executor: ForkingExecutor) -> Supervisor:
    supervisor = Supervisor(store, config, executor)
    assert supervisor.acquire()
    return supervisor


def parent_of(pid: int) -> int:
    return int(psutil.Process(pid).ppid())


def test_a_child_is_forked_and_lives_as_a_cold_one_does(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, executor: ForkingExecutor
) -> None:
    folder = new_job(store, config, "warm", **LONG)
    supervisor.step()
    wait_for(lambda: supervisor.step() and store.get("warm", None).pid)
    pid = started(folder)
    assert parent_of(pid) == executor.pid
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(folder)
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    left_open = {os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd")}
    assert not [each for each in left_open if each.startswith("socket:")], "the forkserver's own door is shut to it"
    store.request_cancel("warm", None)
    job = ended(store, supervisor, "warm")
    assert job.state is JobState.CANCELLED
    assert (folder / "output.log").read_text() == "hello from the child\n"

    cold = new_job(store, config, "cold")
    assert ended(store, new_supervisor(store, config), "cold").state is JobState.COMPLETED
    environments = [json.loads((each / "environment.json").read_text()) for each in (folder, cold)]
    one, other = ({k: v for k, v in each.items() if k not in OF_A_SHELL} for each in environments)
    assert one.pop("MOE_JOB_FOLDER") == str(folder)
    assert other.pop("MOE_JOB_FOLDER") == str(cold)
    assert one.pop(ATTEMPT_VARIABLE) != other.pop(ATTEMPT_VARIABLE)
    assert one == other


@pytest.mark.parametrize("plan", [{"end": "nothing"}, {"end": 7}, {"end": "failed"}, {"killed": 1}, {}], ids=str)
def test_ends_are_told_as_of_cold_ones(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, plan: dict[str, object]
) -> None:
    new_job(store, config, "warm", **plan)
    warm = ended(store, supervisor, "warm")
    new_job(store, config, "cold", **plan)
    cold = ended(store, new_supervisor(store, config), "cold")
    assert (warm.state, warm.reason) == (cold.state, cold.reason)
    assert (warm.state is JobState.COMPLETED) == (not plan)


def test_a_job_waits_for_the_imports_and_can_be_cancelled_meanwhile(
    store: JobStore, config: ProviderConfig, root: Path
) -> None:
    executor = ForkingExecutor(config, waits_for=root / "imported")
    supervisor = Supervisor(store, config, executor)
    assert supervisor.acquire()
    folder, cancelled = new_job(store, config, "first"), new_job(store, config, "second")
    for _ in range(20):
        assert supervisor.step()
    job = store.get("first", None)
    assert (job.state, job.pid) == (JobState.IN_PROGRESS, None)
    assert not (folder / "launches").exists()
    (root / "imported").touch()
    assert ended(store, supervisor, "first").state is JobState.COMPLETED
    assert ended(store, supervisor, "second").state is JobState.COMPLETED
    assert (cancelled / "launches").exists()
    executor.forkservers[0].close()


def test_a_forkserver_that_dies_loses_nothing(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, executor: ForkingExecutor
) -> None:
    folder = new_job(store, config, "running", steps=40, step_s=0.05)
    wait_for(lambda: supervisor.step() and store.get("running", None).pid)
    pid = started(folder)
    os.kill(executor.pid, signal.SIGKILL)
    wait_for(lambda: executor.forkservers[0].readiness() is Readiness.GONE)
    assert psutil.Process(pid).is_running(), "a child outlives it"
    assert ended(store, supervisor, "running").state is JobState.COMPLETED
    after = new_job(store, config, "after")
    assert ended(store, supervisor, "after").state is JobState.COMPLETED
    assert (after / "launches").exists()


def test_a_child_that_is_not_recorded_never_begins(
    config: ProviderConfig, store: JobStore, executor: ForkingExecutor
) -> None:
    folder = new_job(store, config, "job")
    children = []

    def refuse(child: Child) -> None:
        children.append(child)
        raise Conflict("somebody else was quicker")

    while not children:
        try:
            executor.submit(folder, refuse)
        except Conflict:
            break
    (child,) = children
    wait_for(lambda: not is_alive(child.pid, child.birth))
    assert not (folder / "launches").exists()


def test_what_a_child_started_ends_with_it(store: JobStore, config: ProviderConfig, supervisor: Supervisor) -> None:
    folder = new_job(store, config, "job", grandchild=True)
    assert ended(store, supervisor, "job").state is JobState.COMPLETED
    grandchild = int((folder / "grandchild").read_text())
    wait_for(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE)


def test_an_adopted_child_is_told_by_its_process_alone(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, executor: ForkingExecutor
) -> None:
    folder = new_job(store, config, "job", **LONG)
    wait_for(lambda: supervisor.step() and store.get("job", None).pid)
    pid = started(folder)
    job = store.get("job", None)
    assert job.pid_birth is not None
    executor.forkservers[0].close()  # as the death of its supervisor does
    wait_for(lambda: not psutil.pid_exists(executor.pid) or parent_of(pid) != executor.pid)
    other = LocalExecutor(config)
    child = Child(folder, pid, job.pid_birth)
    assert other.poll(child) is None
    other.stop(child, signal.SIGKILL)
    assert wait_for(lambda: other.poll(child)) == Exit(None)
