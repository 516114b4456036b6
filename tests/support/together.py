"""Jobs of several processes with a real supervisor in this process, whose forkserver imports the libraries once."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import kill_children, new_supervisor
from tests.support.training_support import Run, Workshop

LIMIT_S = 600.0
TRIES = 5
CODES = {JobState.COMPLETED: COMPLETED, JobState.FAILED: FAILED, JobState.CANCELLED: STOPPED}


class Office:
    """A store and its supervisor."""

    def __init__(self, store: JobStore, supervisor: Supervisor) -> None:
        self.store = store
        self.supervisor = supervisor

    def submit(self, folder: JobFolder) -> None:
        """As the service does."""
        self.store.submit(folder.root.name, "ann", "sft", "some/model", str(folder.root), 0)

    def job(self, folder: JobFolder) -> Job:
        """The job in the store."""
        return self.store.get(folder.root.name, None)

    def after_steps(self, folder: JobFolder, steps: int) -> Job:
        """The job, when it has taken this number of steps."""
        until = time.monotonic() + LIMIT_S
        while (taken := sum(event.type == "step" for event in read(folder.events).events)) < steps:
            assert time.monotonic() < until, folder.output.read_text()
            self.supervisor.step()
            # Until it trains, there are seconds of imports, which need the cores; then steps follow each other fast.
            time.sleep(0.005 if taken else 0.1)
        return self.job(folder)

    def cancel(self, folder: JobFolder) -> None:
        """As the service does."""
        self.store.request_cancel(folder.root.name, None)

    def cancelled(self, make: Callable[[], JobFolder], steps: int) -> JobFolder:
        """A job that `make` makes, cancelled after this number of steps.

        On a busy machine a job may complete before the request reaches it; then another one is tried.
        """
        for _ in range(TRIES):
            folder = make()
            self.submit(folder)
            self.after_steps(folder, steps)
            self.cancel(folder)
            if self.ended(folder).exit_code != COMPLETED:
                return folder
        raise AssertionError(f"each of {TRIES} jobs completed before it was cancelled")

    def resume(self, folder: JobFolder) -> None:
        """As the service does."""
        self.store.resume(folder.root.name, None)

    def ended(self, folder: JobFolder) -> Run:
        """The run of a job, with the exit code of its last start."""
        until = time.monotonic() + LIMIT_S
        while self.supervisor.step():
            assert time.monotonic() < until, folder.output.read_text()
            time.sleep(0.05)
        return Run(folder, CODES[self.job(folder).state])

    def ranks(self, folder: JobFolder) -> dict[int, int]:
        """Rank -> pid of a job's two processes; the job's pid is their leader's."""
        leader = self.job(folder).pid
        rank_0 = next(event.pid for event in read(folder.events).events if event.type == "started")
        (rank_1,) = {child.pid for child in psutil.Process(leader).children()} - {rank_0}
        return {0: rank_0, 1: rank_1}


@contextmanager
def office(workshop: Workshop) -> Iterator[Office]:
    """An office for the jobs of a workshop; no process of them is left running."""
    settings = {"cancel_grace_s": 300, "max_concurrent_jobs": 1, "max_attempts": 3}
    config = ProviderConfig.model_validate({"state_dir": workshop.root, "supervisor": settings})
    store, executor = JobStore(config.url), LocalExecutor(config)
    try:
        yield Office(store, new_supervisor(store, config, executor))
    finally:
        store.close()
        kill_children(workshop.root / "jobs")
        if executor.forkserver is not None and executor.forkserver.current is not None:
            executor.forkserver.current.close()
