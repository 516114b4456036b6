"""Where a job's training process runs. An executor starts, watches and stops it, and knows nothing about job states."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from llama_stack_provider_moe.control.store.job_row import Job


class Child(NamedTuple):
    """A training process, identified uniquely on its machine, or a run on a cluster, identified by its name."""

    folder: Path
    pid: int  # 0 for a run on a cluster
    birth: float  # see `processes.birth`
    run: str | None = None
    attempt: str = ""  # name of the attempt, see `jobdir.attempt`

    @classmethod
    def of(cls, job: Job) -> "Child | None":
        """Return the process or run of a job in progress; None if there is none yet."""
        if job.run is not None:
            return cls(Path(job.folder), 0, 0.0, job.run, job.attempt)
        if job.pid is None or job.pid_birth is None:
            return None
        return cls(Path(job.folder), job.pid, job.pid_birth, attempt=job.attempt)


class Exit(NamedTuple):
    """How a training process ended: its exit code, -N for signal N, None if only its parent could know."""

    code: int | None
    out_of_memory: bool = False  # the kernel killed a process at that time because memory ran out
    message: str | None = None  # the cluster's message about the end


class Record(Protocol):
    """Records a process, or a run on a cluster, in the store before it begins."""

    def __call__(self, child: Child, write: Callable[[], None] | None = None) -> None:
        """Record the process.

        Args:
            child: The process.
            write: Writes the executor's files to the job's folder; called while nobody else can move the job.
        """


class Executor(Protocol):
    """What the supervisor needs from a place that runs jobs."""

    def submit(self, folder: Path, record: Record, devices: str | None, attempt: str) -> bool:
        """Start a job.

        Args:
            folder: Folder of the job.
            record: Called with the process before it runs any of our code. If it raises, or this process dies
                meanwhile, the job never begins. So there is no training process that the store does not know.
            devices: The devices that the job sees, see `Job.devices`.
            attempt: Name of this attempt, which the processes get.

        Returns:
            False if the job can't start yet and the caller should retry soon.

        Raises:
            OSError: The job can't be started.
        """

    def poll(self, child: Child) -> Exit | None:
        """Return how the process ended, or None while it runs. Kill whatever an ended process has left running.

        This also works for the processes of an earlier supervisor of this machine.
        """

    def stop(self, child: Child, number: int) -> None:
        """Send signal `number` to the process and everything that it started. If it has ended, do nothing."""
