"""Laws of the nursery: a forked training process is like one started cold in all but the time it takes."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobs.executors import Child, Exit
from llama_stack_provider_moe.jobs.executors.local import LocalExecutor, training_environment
from llama_stack_provider_moe.jobs.executors.nursery import Nursery, Warmth
from llama_stack_provider_moe.jobs.processes import is_alive
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import JobStore
from llama_stack_provider_moe.jobs.supervisor import Supervisor
from tests.jobs_support import LONG, ended, new_job, started, tiny_config, wait_for
from tests.tiny_nursery import WAITS_FOR

ROOT = str(Path(__file__).parents[1])
OF_A_SHELL = {"PWD", "OLDPWD", "SHLVL", "_"}


@pytest.fixture
def config(root: Path) -> ProviderConfig:
    return tiny_config(root, max_attempts=1)


class Nursed(LocalExecutor):
    """An executor with a nursery of tiny children; each nursery that it starts is kept in `nurseries`."""

    def __init__(self, config: ProviderConfig, waits_for: Path | None = None) -> None:
        self.nurseries: list[Nursery] = []
        own = config.model_copy(update={"training_python": sys.executable})

        def start() -> Nursery:
            environment = training_environment(os.environ, config) | {"PYTHONPATH": ROOT}
            if waits_for is not None:
                environment[WAITS_FOR] = str(waits_for)
            self.nurseries.append(Nursery(own, environment, "tests.tiny_nursery"))
            return self.nurseries[-1]

        super().__init__(config, nursery=start)

    @property
    def pid(self) -> int:
        """Of the nursery."""
        return self.nurseries[-1]._process.pid


@pytest.fixture
def executor(config: ProviderConfig) -> Iterator[Nursed]:
    executor = Nursed(config)
    yield executor
    for nursery in executor.nurseries:
        nursery.close()


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig, executor: Nursed) -> Supervisor:
    supervisor = Supervisor(store, config, executor)
    assert supervisor.acquire()
    return supervisor


def parent_of(pid: int) -> int:
    return int(psutil.Process(pid).ppid())


def test_a_child_is_forked_and_lives_as_a_cold_one_does(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, executor: Nursed
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
    assert not [each for each in left_open if each.startswith("socket:")], "the nursery's own door is shut to it"
    store.request_cancel("warm", None)
    job = ended(store, supervisor, "warm")
    assert job.state is JobState.CANCELLED
    assert (folder / "output.log").read_text() == "hello from the child\n"

    cold = new_job(store, config, "cold")
    assert ended(store, Supervisor(store, config), "cold").state is JobState.COMPLETED
    environments = [json.loads((each / "environment.json").read_text()) for each in (folder, cold)]
    one, other = ({k: v for k, v in each.items() if k not in OF_A_SHELL} for each in environments)
    assert one.pop("MOE_JOB_FOLDER") == str(folder)
    assert other.pop("MOE_JOB_FOLDER") == str(cold)
    assert one == other


@pytest.mark.parametrize("plan", [{"end": "nothing"}, {"end": 7}, {"end": "failed"}, {"killed": 1}, {}], ids=str)
def test_ends_are_told_as_of_cold_ones(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, plan: dict[str, object]
) -> None:
    new_job(store, config, "warm", **plan)
    warm = ended(store, supervisor, "warm")
    new_job(store, config, "cold", **plan)
    cold = ended(store, Supervisor(store, config), "cold")
    assert (warm.state, warm.reason) == (cold.state, cold.reason)
    assert (warm.state is JobState.COMPLETED) == (not plan)


def test_a_job_waits_for_the_imports_and_can_be_cancelled_meanwhile(
    store: JobStore, config: ProviderConfig, root: Path
) -> None:
    executor = Nursed(config, waits_for=root / "imported")
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
    executor.nurseries[0].close()


def test_a_nursery_that_dies_loses_nothing(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, executor: Nursed
) -> None:
    folder = new_job(store, config, "running", steps=40, step_s=0.05)
    wait_for(lambda: supervisor.step() and store.get("running", None).pid)
    pid = started(folder)
    os.kill(executor.pid, signal.SIGKILL)
    wait_for(lambda: executor.nurseries[0].warmth() is Warmth.GONE)
    assert psutil.Process(pid).is_running(), "a child outlives it"
    assert ended(store, supervisor, "running").state is JobState.COMPLETED
    after = new_job(store, config, "after")
    assert ended(store, supervisor, "after").state is JobState.COMPLETED
    assert (after / "launches").exists()
    assert len(executor.nurseries) == 1


def test_a_child_that_is_not_recorded_never_begins(config: ProviderConfig, store: JobStore, executor: Nursed) -> None:
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
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, executor: Nursed
) -> None:
    folder = new_job(store, config, "job", **LONG)
    wait_for(lambda: supervisor.step() and store.get("job", None).pid)
    pid = started(folder)
    job = store.get("job", None)
    assert job.pid_birth is not None
    executor.nurseries[0].close()  # as the death of its supervisor does
    wait_for(lambda: not psutil.pid_exists(executor.pid) or parent_of(pid) != executor.pid)
    other = LocalExecutor(config)
    child = Child(folder, pid, job.pid_birth)
    assert other.poll(child) is None
    other.stop(child, signal.SIGKILL)
    assert wait_for(lambda: other.poll(child)) == Exit(None)
