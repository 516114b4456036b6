"""What sweeps and pipelines have in common as groups of jobs: names, errors about one job, deletion."""

import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_stack_provider_moe.control.server import job_changes
from llama_stack_provider_moe.control.store import parent_jobs
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor import removal
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidBody, MoeError, NotFound
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig


class Deleted(NamedTuple):
    """What was deleted of a group.

    Attributes:
        jobs: its jobs.
        kept: folders that were not deleted.
        broken: jobs that needed their files, and what they can't do now.
    """

    jobs: list[str]
    kept: list[str]
    broken: list[str]


def free_id(asked: str | None, kind: str, get: Callable[[str], object]) -> str:
    """Return the name of a new group.

    Args:
        asked: the name that the caller wants; None: any.
        kind: `sweep` or `pipeline`.
        get: raises `NotFound` if there is no group of a name.

    Raises:
        Conflict: the name is taken, whoever owns that group.
    """
    name = asked or f"{kind}-{uuid.uuid4().hex[:12]}"
    try:
        get(name)
    except NotFound:
        return name
    raise Conflict(f"{kind}_uuid: {name!r} is taken; leave it out, or choose another name")


def about(error: Exception, where: str) -> MoeError:
    """Return the same kind of error, with the job of the group that it is about."""
    return reworded(error, lambda problem: f"{where}: {problem}")


def reworded(error: Exception, located: Callable[[str], str]) -> MoeError:
    """Return the same kind of error, with each of its problems as `located` returns it."""
    if isinstance(error, InvalidBody):
        return InvalidBody([located(problem) for problem in error.problems])
    if isinstance(error, ValueError):  # InvalidInput is one
        return InvalidBody([located(str(error))])
    if isinstance(error, Forbidden | NotFound | Conflict):
        return type(error)(located(str(error)))
    assert isinstance(error, MoeError), "the caller catches these two kinds"
    return error


def delete(
    store: JobStore, config: ProviderConfig, group: str, jobs: Sequence[Job], whose: str | None, force: bool
) -> Deleted:
    """Delete the jobs of a group, which must all have ended; the group goes with the last one.

    Everything that can refuse a deletion is checked for all of them before the first one is deleted.

    Args:
        store: the store.
        config: the server's configuration.
        group: kind and name of the group, for an error.
        jobs: its jobs, in the order of their deletion.
        whose: the owner whose jobs the caller may delete; None for every owner's.
        force: delete them even if other jobs need their files.

    Raises:
        Conflict: one of them or of their exports waits or runs, or jobs outside the group need their files.
    """
    _must_be_deletable(store, config, group, jobs, force)
    deleted = Deleted([], [], [])
    # One after the other. If one is used or resumed meanwhile, the group stays with it and with those after it.
    for job in jobs:
        gone = job_changes.delete(store, config, job.id, whose, force)
        deleted.jobs.append(job.id)
        deleted.kept.extend(gone.kept)
        deleted.broken.extend(gone.broken)
    return deleted


def _must_be_deletable(store: JobStore, config: ProviderConfig, group: str, jobs: Sequence[Job], force: bool) -> None:
    exports = [export for job in jobs for export in store.exports(job.id)]
    waiting = list(dict.fromkeys(job.id for job in (*jobs, *exports) if not job.state.ended))
    if waiting:
        raise Conflict(f"{group} has jobs that wait or run ({', '.join(waiting[:3])}); cancel it before you delete it")
    for job in (*jobs, *exports):
        removal.must_be_here(job, config)
        if not force:
            removal.must_be_unread(job, config)
    needing = [] if force else store.dependents(*(job.id for job in jobs))
    if needing:
        again = any(job.state in (JobState.FAILED, JobState.CANCELLED) for job in needing)
        why = " (one that failed or was cancelled can be resumed, so it still needs them)" if again else ""
        raise Conflict(
            f"{group} is needed by {parent_jobs.named(needing, jobs[0].owner)}; nothing was deleted. Delete those "
            f"first, or force its deletion, which takes away files that they need{why}"
        )
