"""Where a job's training process runs. An executor starts, watches and stops it, and knows nothing of states."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from llama_stack_provider_moe.jobs.record import Job


class Child(NamedTuple):
    """A training process, by what tells it from every other one of its machine; or a run on a cluster, by its name."""

    folder: Path
    pid: int  # 0: of a run
    birth: float  # see `processes.birth`
    run: str | None = None

    @classmethod
    def of(cls, job: Job) -> "Child | None":
        """What runs for a job in progress; None where nothing does yet."""
        if job.run is not None:
            return cls(Path(job.folder), 0, 0.0, job.run)
        if job.pid is None or job.pid_birth is None:
            return None
        return cls(Path(job.folder), job.pid, job.pid_birth)


class Exit(NamedTuple):
    """How a training process ended: its exit code, -N for signal N, None where only its parent could have known."""

    code: int | None
    out_of_memory: bool = False  # the kernel killed a process for want of memory at that time
    said: str | None = None  # of that end, by the cluster it ran on


class Executor(Protocol):
    """What the supervisor asks of a place to run jobs."""

    def submit(self, folder: Path, record: Callable[[Child], None], devices: str | None) -> bool:
        """Start the job in `folder`, to see `devices` (see `Job.devices`); OSError where that is not possible.

        False: not yet, ask again soon.

        `record` is called with the process before it runs a line of ours. If it raises, or this process dies on the
        way, the job never begins: there is no training process that the store does not know.
        """

    def poll(self, child: Child) -> Exit | None:
        """None while it runs. Once it has ended, nothing that it started is left running.

        Answers for the children of an earlier supervisor of this machine too.
        """

    def stop(self, child: Child, number: int) -> None:
        """Send signal `number` to it and everything it started; nothing happens where it has ended."""
