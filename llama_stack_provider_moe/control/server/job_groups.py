"""What sweeps and pipelines have in common as groups of jobs: names, errors about one job, deletion."""

import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_stack_provider_moe.control.server import job_changes
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidBody, MoeError, NotFound
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
    if isinstance(error, InvalidBody):
        return InvalidBody([f"{where}: {problem}" for problem in error.problems])
    if isinstance(error, ValueError):  # InvalidInput is one
        return InvalidBody([f"{where}: {error}"])
    if isinstance(error, Forbidden | NotFound | Conflict):
        return type(error)(f"{where}: {error}")
    assert isinstance(error, MoeError), "the caller catches these two kinds"
    return error


def delete(
    store: JobStore, config: ProviderConfig, group: str, jobs: Sequence[Job], whose: str | None, force: bool
) -> Deleted:
    """Delete the jobs of a group, which must all have ended; the group goes with the last one.

    Args:
        store: the store.
        config: the server's configuration.
        group: kind and name of the group, for an error.
        jobs: its jobs, in the order of their deletion.
        whose: the owner whose jobs the caller may delete; None for every owner's.
        force: delete them even if other jobs need their files.

    Raises:
        Conflict: one of them waits or runs, or other jobs need its files.
    """
    waiting = [job.id for job in jobs if not job.state.ended]
    if waiting:
        raise Conflict(f"{group} has jobs that wait or run ({', '.join(waiting[:3])}); cancel it before you delete it")
    deleted = Deleted([], [], [])
    # One after the other. If one can't be deleted, the group stays with it and with those after it.
    for job in jobs:
        gone = job_changes.delete(store, config, job.id, whose, force)
        deleted.jobs.append(job.id)
        deleted.kept.extend(gone.kept)
        deleted.broken.extend(gone.broken)
    return deleted
