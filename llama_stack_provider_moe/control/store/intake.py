"""Create a new job's folder and row: both or neither, without losing the content of an existing folder."""

import fcntl
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.store import limits
from llama_stack_provider_moe.control.store.pipeline_rows import NewPipeline
from llama_stack_provider_moe.control.store.store import Job, JobStore, NewJob
from llama_stack_provider_moe.control.store.sweep_rows import NewSweep
from llama_stack_provider_moe.errors import Conflict, MoeError, NotFound
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig

STALE_STAGING_S = 24 * 3600
log = logging.getLogger(__name__)


def accept_job(store: JobStore, new: NewJob, staged: Path, owner_limits: LimitsConfig = limits.NONE) -> Job:
    """Move the folder `staged` to the job's place and insert the job's row. Only one process may call it at a time.

    Raises:
        OverLimit: Its owner is at one of `owner_limits`.
        Conflict: The id is taken, or a folder with its name contains results.
        SQLAlchemyError: The store failed. The folder stays if it is unknown whether the store has the job.
    """
    place(staged, Path(new.folder))
    try:
        return store.add(new, owner_limits)
    except (MoeError, SQLAlchemyError, OSError) as error:
        job = _settled(store, new, error)
        if job is not None:
            return job
        shutil.rmtree(new.folder, ignore_errors=True)
        raise


class NewGroup(NamedTuple):
    """Jobs that are accepted together: a sweep's, or a pipeline's.

    Attributes:
        id: Name of the group.
        jobs: The jobs.
        add: Inserts the group with its jobs into the store, within the limits of its owner.
        found: Returns the group's jobs in the store by id; raises `NotFound` without such a group.
    """

    id: str
    jobs: Sequence[NewJob]
    add: Callable[[LimitsConfig], list[Job]]
    found: Callable[[], Mapping[str, Job]]

    @classmethod
    def of_sweep(cls, store: JobStore, new: NewSweep) -> "NewGroup":
        """Return the jobs of a sweep."""
        return cls(new.id, [job for job, _ in new.jobs], partial(store.sweeps.add, new),
                   lambda: store.sweeps.get(new.id, None).jobs)  # fmt: skip

    @classmethod
    def of_pipeline(cls, store: JobStore, new: NewPipeline) -> "NewGroup":
        """Return the jobs of a pipeline."""
        return cls(new.id, [job for job, _ in new.parts], partial(store.pipelines.add, new),
                   lambda: store.pipelines.get(new.id, None).jobs)  # fmt: skip


def accept_group(store: JobStore, new: NewGroup, staged: Sequence[Path], owner_limits: LimitsConfig) -> list[Job]:
    """Move the folders of a group's jobs into place and insert the group: all of it or nothing. See `accept_job`.

    Raises:
        OverLimit: The jobs would exceed one of `owner_limits`.
        Conflict: A name is taken, or a folder with its name contains results.
        SQLAlchemyError: The store failed. The folders stay if it is unknown whether the store has the group.
    """
    placed: list[str] = []
    try:
        for path, job in zip(staged, new.jobs, strict=True):
            place(path, Path(job.folder))
            placed.append(job.folder)
        return new.add(owner_limits)
    except (MoeError, SQLAlchemyError, OSError) as error:
        found = _settled_group(store, new, error)
        if found is not None:
            return found
        for folder in placed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _settled_group(store: JobStore, new: NewGroup, error: Exception) -> list[Job] | None:
    """Return the group's jobs if the store has it after all, None if it has not; see `_settled`."""
    if not isinstance(error, SQLAlchemyError):
        return None
    try:
        if not store.is_embedded:
            try:
                return new.add(limits.NONE)
            except (Conflict, NotFound):
                pass
        found = new.found()
    except NotFound:
        return None
    except SQLAlchemyError:
        log.exception("%s: it is unknown whether the store has it; its jobs' folders stay for now", new.id)
        raise error from None
    if sorted(found) != sorted(job.id for job in new.jobs):
        return None
    return [found[job.id] for job in new.jobs]


def _settled(store: JobStore, new: NewJob, error: Exception) -> Job | None:
    """Return the job if the store has it after all, None if it has not; raise `error` if that is unknown.

    A commit whose answer was lost may have happened, or may still be under way. A second insert waits for it. Then it
    is refused, or it succeeds in its place.
    """
    try:
        if isinstance(error, SQLAlchemyError) and not store.is_embedded:
            try:
                return store.add(new)
            except (Conflict, NotFound):
                pass
        found = store.get(new.id, None)
    except NotFound:
        return None
    except SQLAlchemyError:
        log.exception("job %s: it is unknown whether the store has it; %s stays for now", new.id, new.folder)
        raise error from None
    if found.folder != new.folder:
        return None
    log.warning("job %s: the store has it, although the answer was lost", new.id)
    return found


def place(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`, which no store knows. An existing folder without results is set aside.

    Raises:
        Conflict: The existing folder contains results.
    """
    if folder.exists():
        results = results_in(folder)
        if results:
            raise Conflict(
                f"job_uuid: {folder.name!r} can't be used: {folder} exists and contains {', '.join(results)} of a job "
                "that is not in this server's store; move that folder away, or choose another job_uuid"
            )
        aside = folder.parent.parent / "set-aside" / f"{folder.name}.{uuid.uuid4().hex}"
        aside.parent.mkdir(mode=0o700, exist_ok=True)
        folder.rename(aside)
        log.warning("%s belonged to no job in the store; it was moved to %s", folder, aside)
    staged.rename(folder)


def remove_stale(staging: Path) -> None:
    """Delete the staged folders of servers that died while they received rows."""
    for folder in staging.iterdir():
        if time.time() - folder.stat().st_mtime > STALE_STAGING_S:
            shutil.rmtree(folder, ignore_errors=True)


def results_in(folder: Path) -> list[str]:
    """Names of the files that a job's process has written to its folder."""
    job = JobFolder(folder)
    written = (job.events, job.manifest, job.artifacts, folder / "checkpoints", job.output)
    return [path.name for path in written if path.exists()]


@contextmanager
def committing(config: ProviderConfig) -> Iterator[None]:
    """Allow one commit at a time among all processes that share the state folder; no folder stays without a row."""
    with config.privacy.appended(config.jobs_dir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
