"""Deleting a job with its folder and its exports, and the folders of jobs that ended long ago.

The folder is renamed away while the job's row is locked, then the row goes, then the folder's content. Whatever dies in
between: a row whose folder is gone can be deleted again, and what was renamed away is removed by the next deletion.
Nothing outside the folder is touched, a `checkpoint_dir` elsewhere neither; but its copies in a mirror go first.
"""

import logging
import shutil
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.mirrors import Mirror, read_places
from llama_stack_provider_moe.jobs.store import Job, JobStore

log = logging.getLogger(__name__)

_AT_A_TIME = 100


def remove(store: JobStore, config: ProviderConfig, job_id: str, owner: str | None) -> list[Job]:
    """Delete a job that has ended, its exports, and their folders; the job as it was, then its exports.

    Raises:
        NotFound: no such job of this owner.
        Conflict: it, or an export of it, waits or runs.
        OSError: its folder can't be moved; the job stays.
    """
    graves = config.state_dir / "deleted"

    def bury(job: Job) -> None:
        folder = Path(job.folder)
        if folder.parent != config.jobs_dir:  # a store shared with a server that has another `state_dir`
            raise Conflict(f"job {job.id!r} keeps its files in {folder}, which is not under this server's state_dir")
        graves.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # an earlier deletion came as far as this
            folder.rename(graves / f"{job.id}.{uuid.uuid4().hex}")

    removed = store.delete(job_id, owner, first=bury)
    # The folder itself stays: another deletion may just be about to rename into it, and would take a missing one for
    # a job's folder that is gone already. What can't be removed now is tried again with the next job.
    for grave in graves.iterdir():
        if _forget_copies(grave):
            shutil.rmtree(grave, ignore_errors=True)
    return removed


def _forget_copies(grave: Path) -> bool:
    """Whether nothing of the job is left in a mirror."""
    try:
        for url in read_places(JobFolder(grave)).urls:
            Mirror(url).remove()
    except (OSError, ValueError) as error:
        log.warning("%s stays until its copies are gone: %s", grave, error)
        return False
    return True


def remove_older(store: JobStore, config: ProviderConfig) -> list[str]:
    """Delete the jobs that ended more than `retention_days` ago, at most 100 at a time; their ids."""
    days = config.supervisor.retention_days
    if days is None:
        return []
    removed = []
    for job in store.ended_before(now() - timedelta(days=days), _AT_A_TIME):
        with suppress(NotFound, Conflict):  # deleted, or resumed, by somebody else meanwhile; or not ours
            removed += [each.id for each in remove(store, config, job.id, None)]
    return removed
