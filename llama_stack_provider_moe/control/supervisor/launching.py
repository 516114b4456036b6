"""Start a job's process, and write the files that it needs to its folder."""

from collections.abc import Callable
from pathlib import Path

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.store.transitions import Fence
from llama_stack_provider_moe.control.supervisor.executors import Child, Executor
from llama_stack_provider_moe.jobdir.attempt import Attempt
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic


def launch(store: JobStore, executor: Executor, job: Job, fence: Fence) -> bool:
    """Start the process of a claimed job; return False if it can't start yet and the caller should retry soon.

    The job's folder is prepared in the transaction that records the process, before the process begins. So a supervisor
    that was superseded writes nothing to the folder.

    Args:
        store: The store that knows the job.
        executor: Where the job runs.
        job: The claimed job.
        fence: What must still hold.

    Raises:
        OSError: The process can't be started.
        Conflict: The job already has a process; `Superseded`, `LeaseLost`: see `Fence`.
    """
    folder = JobFolder(Path(job.folder))

    def record(child: Child, write: Callable[[], None] | None = None) -> None:
        def first() -> None:
            if job.attempts > 1:  # an earlier attempt may have left a manifest that did not count
                folder.manifest.unlink(missing_ok=True)
            write_atomic(folder.attempt, Attempt(number=job.attempts, name=job.attempt))
            if write is not None:
                write()

        pid, birth = (None, None) if child.run is not None else (child.pid, child.birth)
        store.launched(job.id, pid, birth, child.run, fence, first)

    return executor.submit(folder.root, record, job.devices, job.attempt)
