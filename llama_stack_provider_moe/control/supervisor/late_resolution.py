"""`LateResolution`: has the names of waiting jobs resolved once the jobs that they wait for have completed.

The resolution reads files of jobs and imports the server's code, so it runs in a process of its own: it can't hold up
the supervisor, and a supervisor that takes over may repeat it.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from llama_stack_provider_moe.control.store.references import uses_of
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.store.transitions import Fence
from llama_stack_provider_moe.control.supervisor.outcome import REASON_LIMIT, Outcome
from llama_stack_provider_moe.errors import Conflict, LeaseLost
from llama_stack_provider_moe.ground.redaction import known_secrets, scrubbed
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.reading import why_unreadable
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig

MODULE = "llama_stack_provider_moe.control.server.late_names"
REFUSED = 3  # exit code: the job can't run with what the other jobs left
LIMIT_S = 300.0
MOST_TRIES = 3

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class _Running(NamedTuple):
    job: Job
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    started: float  # time.monotonic()


class LateResolution:
    """The jobs of one store that wait for other jobs. Only the supervisor that holds the lease may call it.

    Args:
        store: The store.
        config: The provider's configuration.
        supervisor_id: Id of the supervisor.
    """

    def __init__(self, store: JobStore, config: ProviderConfig, supervisor_id: str) -> None:
        self._store = store
        self._config = config
        self._id = supervisor_id
        self._running: _Running | None = None
        self._tries: dict[str, int] = {}  # job id -> resolutions that ended without an answer

    @property
    def is_busy(self) -> bool:
        """Whether a resolution runs, whose end nobody writes to the store."""
        return self._running is not None

    def look(self) -> list[tuple[Job, Outcome]]:
        """Have names resolved, one job at a time; return the waiting jobs that will never start."""
        failed: list[tuple[Job, Outcome]] = []
        if self._running is not None and (why := self._settled(self._running)) is not None:
            failed.append((self._running.job, _failure(self._running.job, why)))
        if self._running is not None and self._running.process.returncode is not None:
            self._running.output.close()
            self._running = None
        due = self._store.waits.due()
        failed += [(job, _failure(job, why)) for job, why in due.broken]
        ended = {job.id for job, _ in failed}
        if self._running is None and (ready := [job for job in due.ready if job.id not in ended]):
            self._running = self._start(ready[0])
        return failed

    def _start(self, job: Job) -> _Running:
        output = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `look`; not a pipe: nobody would drain it
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, job.id], stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            with process.stdin:
                process.stdin.write(self._config.model_dump_json().encode())
        except BrokenPipeError:  # it died; `_settled` reads why
            pass
        log.info("job %s: the jobs that it waits for have completed; its names are being resolved", job.id)
        return _Running(job, process, output, time.monotonic())

    def _settled(self, running: _Running) -> str | None:
        """Settle a resolution that has ended; return why its job fails, None if it does not."""
        code = running.process.poll()
        if code is None and time.monotonic() - running.started > LIMIT_S:
            running.process.kill()
            code = running.process.wait()
        if code is None:
            return None
        running.output.seek(0)
        told = running.output.read(1 << 20).decode("utf-8", "replace").strip()
        told = scrubbed(told, known_secrets(os.environ, self._config.secrets))
        if code == REFUSED:
            return told
        if code == 0:
            self._tries.pop(running.job.id, None)
            return self._recorded(running.job)
        tries = self._tries[running.job.id] = self._tries.get(running.job.id, 0) + 1
        log.warning("job %s: its names were not resolved, try %d (exit code %s): %s", running.job.id, tries, code, told)
        if tries < MOST_TRIES:
            return None
        del self._tries[running.job.id]
        return f"its names could not be resolved in {tries} tries; the last one ended with exit code {code}: {told}"

    def _recorded(self, job: Job) -> str | None:
        """Have a job wait no longer, now that its names are resolved; return why it fails, None if it does not."""
        folder = Path(job.folder)
        try:
            uses = uses_of(JobFolder(folder).read_spec(), folder.parent)
        except (OSError, ValueError) as error:  # its folder was damaged or moved away meanwhile
            return f"its spec.json can't be read: {why_unreadable(error)}"
        try:
            self._store.waits.resolved(job, uses, Fence.of(self._id, job))
        except LeaseLost:
            raise
        except Conflict as conflict:  # cancelled or deleted meanwhile, or what it waits for has changed
            log.warning("%s", conflict)
            return None
        log.info("job %s: waits for no other job now", job.id)
        return None


def _failure(job: Job, why: str) -> Outcome:
    return Outcome(JobState.FAILED, why[:REASON_LIMIT], job.artifacts)
