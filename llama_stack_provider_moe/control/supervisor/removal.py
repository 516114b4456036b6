"""Delete a job with its folder and its exports, and delete jobs that ended long ago.

The folder is renamed while the job's row is locked. Then the row is deleted, then the content of the folder. If a
process dies in between, the next deletion handles the renamed folder: if the job still exists (the database failed, or
a power cut), it gets its folder back; otherwise the folder is deleted.
Nothing outside the folder is touched, not even a `checkpoint_dir` elsewhere. Copies in a mirror are deleted first, and
a model that an export put on the inference server is withdrawn.
"""

import logging
import shutil
import time
import uuid
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.store.parent_jobs import named
from llama_stack_provider_moe.control.store.store import Job, Jobs, JobStore
from llama_stack_provider_moe.control.supervisor import withdrawal
from llama_stack_provider_moe.control.supervisor.watchdog import WallClock
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir import readers
from llama_stack_provider_moe.jobdir.attempt import read_attempt
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.mirror import Mirror, read_places
from llama_stack_provider_moe.jobdir.reading import why_unreadable
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig

# Time between two searches for jobs that ended long ago.
RETENTION_LOOK_S = 3600.0
# If the clock was set by more than this, the ages of jobs are unreliable and nothing is deleted by age.
CLOCK_TOLERANCE_S = 3600.0

log = logging.getLogger(__name__)
_supervisor_log = logging.getLogger("llama_stack_provider_moe.supervisor")

_AT_A_TIME = 100
_OF_PROBE = "the model that its probe reads is gone"


class Removed(NamedTuple):
    """The result of a deletion.

    Attributes:
        job: The deleted job as it was.
        exports: Its exports, which were deleted with it.
        broken: Jobs that needed their files.
        readers: Who else read their files.
    """

    job: Job
    exports: Jobs
    broken: Jobs
    readers: list[str]


def deleted_dir(config: ProviderConfig) -> Path:
    """Return the folder for the folders of deleted jobs, until they are removed. Create it before the disk is full."""
    return config.state_dir / "deleted"


def must_be_here(job: Job, config: ProviderConfig) -> Path:
    """Return a job's folder; raise `Conflict` if it belongs to a server with another `state_dir` and the same store."""
    folder = Path(job.folder)
    if folder.parent != config.jobs_dir:
        raise Conflict(f"job {job.id!r} keeps its files in {folder}, which is not under this server's state_dir")
    return folder


def must_be_unread(job: Job, config: ProviderConfig) -> None:
    """Raise `Conflict` if shields of a server read files of a job."""
    found = readers.of(must_be_here(job, config))
    if found:
        raise Conflict(
            f"job {job.id!r} is read by {', '.join(map(str, found))}; take it out of their configuration and start "
            "that server again first, or force its deletion, which takes away files that they need"
        )


def remove(
    store: JobStore,
    config: ProviderConfig,
    job_id: str,
    owner: str | None,
    force: bool = False,
    ended_before: datetime | None = None,
) -> Removed:
    """Delete a job that has ended, its exports, and their folders.

    Args:
        store: The store that knows the job.
        config: The configuration whose state folder contains the job's folder.
        job_id: Id of the job.
        owner: Owner of the job; None for any owner.
        force: Delete them even if other jobs need their files, or shields read them.
        ended_before: Delete them only if all of them ended before this time.

    Raises:
        NotFound: The owner has no such job.
        Conflict: The job or one of its exports waits, runs or ended too late, or other jobs need their files.
        OSError: The folder can't be moved; the job stays.
        SQLAlchemyError: The store failed; the job may or may not exist.
    """
    deleted = deleted_dir(config)
    family: Jobs = []
    broken: Jobs = []
    read_by: list[str] = []

    def move_away(job: Job) -> None:
        folder = must_be_here(job, config)
        if force:
            read_by.extend(map(str, readers.of(folder)))
        else:
            must_be_unread(job, config)
        if ended_before is not None and (job.ended_at is None or job.ended_at >= ended_before):
            raise Conflict(f"job {job.id!r} was resumed meanwhile and has ended again")
        deleted.mkdir(mode=0o700, exist_ok=True)
        family.insert(0, job)  # the job itself comes last
        with suppress(FileNotFoundError):  # an earlier deletion already moved it
            folder.rename(deleted / f"{job.id}.{uuid.uuid4().hex}")

    try:
        removed = store.delete(job_id, owner, first=move_away, force=broken.extend if force else None)
    except (SQLAlchemyError, OSError, Conflict):
        # Usually nothing happened. But the commit may have happened although its answer was lost.
        restore(store, config)
        if not family or store.while_locked(job_id, lambda _: None):
            raise
        removed = family
    sweep(store, config)
    return Removed(removed[0], removed[1:], broken, list(dict.fromkeys(read_by)))


def sweep(store: JobStore, config: ProviderConfig) -> None:
    """Finish deletions: remove the folders of jobs that no longer exist, and what those jobs have left elsewhere.

    Folders that can't be removed now are tried again by the next deletion, and by the next server.
    """
    # The folder `deleted` itself stays: another deletion may be about to rename into it, and would mistake the error
    # for a job's folder that no longer exists.
    kept = restore(store, config)
    for moved in deleted_dir(config).iterdir():
        if moved not in kept and _remove_copies(moved) and withdrawal.withdraw(moved, config.serving):
            shutil.rmtree(moved, ignore_errors=True)


def are_left(config: ProviderConfig, job_id: str) -> bool:
    """Return whether files of a deleted job, or what it has left elsewhere, are still to be removed."""
    return any(moved.name.rpartition(".")[0] == job_id for moved in deleted_dir(config).iterdir())


def restore(store: JobStore, config: ProviderConfig) -> list[Path]:
    """Give jobs that still exist their folders back, after a deletion that failed had renamed them.

    Returns:
        Folders that stay where they are: a job lacks its folder, but it is unclear whether this is the one.
    """
    deleted = deleted_dir(config)
    kept: list[Path] = []
    for moved in deleted.iterdir() if deleted.is_dir() else ():

        def put_back(job: Job, moved: Path = moved) -> None:
            folder = Path(job.folder)
            if folder.parent != config.jobs_dir or folder.exists():
                return
            try:
                counts = read_attempt(moved)
            except (OSError, ValidationError) as error:
                log.warning("%s stays, although job %s has no folder: its attempt can't be read: %s", moved, job.id,
                            why_unreadable(error))  # fmt: skip
                kept.append(moved)
                return
            # It may belong to an earlier job with the same id, whose copies can't be removed.
            if counts is not None and counts.name != job.attempt:
                kept.append(moved)
            else:
                moved.rename(folder)
                log.warning("job %s was not deleted after all: its folder was restored", job.id)

        # This waits for a deletion that is under way, and then finds no such job.
        store.while_locked(moved.name.rpartition(".")[0], put_back)
    return kept


def _remove_copies(moved: Path) -> bool:
    """Remove the job's copies from mirrors; return whether none is left."""
    try:
        for url in read_places(JobFolder(moved)).urls:
            Mirror(url).remove()
    except (OSError, ValueError) as error:
        log.warning("%s stays until its copies are removed: %s", moved, error)
        return False
    return True


def broken_by(removed: Removed) -> list[str]:
    """Describe for the user what jobs that needed the deleted files can no longer do."""
    lost = {
        "completed": "the model that its adapter was trained on is gone",
        "failed": "it can't be resumed",
        "cancelled": "it can't be resumed",
    }
    return [
        f"job {job.id!r} ({job.state.value}): "
        + (_OF_PROBE if job.recipe == "probe" and job.state is JobState.COMPLETED
           else lost.get(job.state.value, "it will fail"))
        for job in removed.broken
        if job.owner == removed.job.owner
    ] + [
        f"{count} job(s) of other owners" for count in [sum(job.owner != removed.job.owner for job in removed.broken)]
        if count
    ] + [f"{reader}: they can't score once they start again" for reader in removed.readers]  # fmt: skip


class Retention:
    """Deletes jobs that ended more than `supervisor.retention_days` ago, unless other jobs need their files.

    Args:
        store: The store of the jobs.
        config: The provider's configuration.
    """

    def __init__(self, store: JobStore, config: ProviderConfig) -> None:
        self._store = store
        self._config = config
        self._days = config.supervisor.retention_days
        self._clock = WallClock()
        self._due = 0.0  # time.monotonic()
        self._reported: set[str] = set()  # ids of jobs that are kept; each is logged once

    def look(self) -> None:
        """Delete some old jobs if a search is due; the next call may find more."""
        if self._days is None or time.monotonic() < self._due:
            return
        moved_s = self._clock.moved_s()
        if abs(moved_s) > CLOCK_TOLERANCE_S:
            _supervisor_log.warning(
                "the clock was set by %+.0f s: this supervisor no longer deletes jobs by age", moved_s
            )
            self._due = time.monotonic() + RETENTION_LOOK_S
            return
        removed = self.remove_older()
        if removed:
            _supervisor_log.info("deleted after %g days: %s", self._days, " ".join(removed))
        else:
            self._due = time.monotonic() + RETENTION_LOOK_S

    def remove_older(self) -> list[str]:
        """Delete at most 100 jobs that are old enough; return their ids."""
        if self._days is None:
            return []
        moment = now() - timedelta(days=self._days)
        removed = []
        for job in self._store.ended_before(moment, _AT_A_TIME):
            if read_by := readers.of(Path(job.folder)):
                if job.id not in self._reported:
                    self._reported.add(job.id)
                    _supervisor_log.info("job %s is older than %g days, but kept for %s", job.id, self._days,
                                         ", ".join(map(str, read_by)))  # fmt: skip
                continue
            try:
                done = remove(self._store, self._config, job.id, None, ended_before=moment)
            except (NotFound, Conflict):  # deleted, resumed or used meanwhile; or it belongs to another server
                continue
            except OSError as error:  # one folder must not stop the supervisor
                _supervisor_log.warning("job %s is older than %g days, but can't be deleted: %s", job.id, self._days,
                                        error)  # fmt: skip
                continue
            removed += [each.id for each in (done.job, *done.exports)]
        for job in self._store.ended_before(moment, _AT_A_TIME, needed=True):
            if job.id not in self._reported:
                self._reported.add(job.id)
                needed_by = named(self._store.dependents(job.id), job.owner)
                _supervisor_log.info("job %s is older than %g days, but kept for %s", job.id, self._days, needed_by)
        return removed
